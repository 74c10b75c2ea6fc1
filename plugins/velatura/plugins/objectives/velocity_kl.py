"""What objectives share: distances between velocities, reduced per point and over points.

For two flows with the same noise the KL divergence of one step is a time-dependent factor times ||v - v_ref||^2; the
velocity KL drops the factor (DiffusionNFT, arXiv:2509.16117; AWM, arXiv:2509.25050). Latent dimensions are averaged,
never summed, so coefficients do not depend on the size of a picture.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from velatura.api import Points, VelaturaError


def widened(v: Tensor) -> Tensor:
    """`v` in fp32, or as it is in fp64: differences of bf16 velocities are mostly rounding."""
    return v if v.dtype == torch.float64 else v.float()


def latent_mean(values: Tensor) -> Tensor:
    """[N ...] -> [N], the mean over latent dimensions."""
    return values.flatten(1).mean(1)


def velocity_kl(v: Tensor, anchor: Tensor) -> Tensor:
    """mean (v - anchor)^2, [N]; no gradient flows into the anchor."""
    return latent_mean((widened(v) - widened(anchor.detach())).square())


Weighting = Literal["uniform", "t", "ghuber", "adaptive-l1"]
"""What becomes of a squared error; see `weighted_error`."""
HUBER_POWER, HUBER_OFFSET = 0.25, 1e-10
"""Shape of the released generalised Huber weighting (AWM, arXiv:2509.25050): part of its definition."""
ERROR_FLOOR = 1e-5
"""Least denominator of the adaptive form: part of the published definition."""


def weighted_error(error: Tensor, t: Tensor, weighting: Weighting) -> Tensor:
    """A loss [N] of errors [N ...] at times t [N], with m = mean error^2.

    `uniform` m; `t` t m; `ghuber` 4 t ((m + 1e-10)^0.25 - 1e-10^0.25), whose gradient hardly depends on the size of m
    (AWM, arXiv:2509.25050); `adaptive-l1` t m / max(sg mean |error|, 1e-5), whose gradient does not (arXiv:2602.04663,
    where sums over the D latent dimensions and a factor D stand in place of the means).
    """
    squared, time = latent_mean(error.square()), t.to(error.dtype)
    if weighting == "uniform":
        return squared
    if weighting == "t":
        return time * squared
    if weighting == "adaptive-l1":
        return time * squared / latent_mean(error.detach().abs()).clamp_min(ERROR_FLOOR)
    rooted = (squared + HUBER_OFFSET).pow(HUBER_POWER) - math.pow(HUBER_OFFSET, HUBER_POWER)
    return time * rooted / HUBER_POWER


def norm_ratio(v: Tensor, anchor: Tensor) -> Tensor:
    """||v|| / ||anchor||, [N], without gradient. Reinforcement learning tends to inflate it (arXiv:2606.27771)."""
    own, other = (latent_mean(widened(velocity.detach()).square()).sqrt() for velocity in (v, anchor))
    return own / other.clamp_min(1e-12)


def flow_target(points: Points) -> Tensor:
    """u = eps - x_0, [N ...], of forward-process points."""
    if points.target is None:
        raise VelaturaError("This objective learns from re-noised clean latents, but the points carry no target.")
    return widened(points.target.detach())


def weighted_sum(values: Tensor, points: Points) -> Tensor:
    """sum_n weight_n values_n, []: the reduction of every loss."""
    return (points.weight.to(values.dtype) * values).sum()


def average(values: Tensor, points: Points) -> Tensor:
    """Mean of `values` [N] over points in proportion to their weight, [], for metrics; 0 when all weights are 0."""
    total = points.weight.sum().clamp_min(torch.finfo(points.weight.dtype).tiny)
    return weighted_sum(values.detach(), points) / total


def per_latent(values: Tensor, like: Tensor) -> Tensor:
    """[N] shaped so that it broadcasts against `like` [N ...]."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
