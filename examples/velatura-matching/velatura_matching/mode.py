"""The sampler of timesteps `mode`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Options, StepPlan, TimestepSampler

LARGEST = 2 / (math.pi - 2)
"""Beyond this scale the time is no longer a falling function of the draw."""


class ModeOptions(Options):
    """Options of `mode`."""

    count: int = Field(6, ge=1, description="How many steps to train on; all there are when the grid has fewer.")
    scale: float = Field(
        1.29, ge=-1, le=LARGEST, description="s: 0 draws uniformly, above 0 favours the middle, below 0 both ends."
    )
    noise: Literal["trained", "all"] = Field(
        "trained", description="With a kernel that draws noise: on which steps; the others follow the ODE."
    )


class Mode(TimestepSampler[ModeOptions]):
    """`count` steps without replacement, drawn by mode sampling with heavy tails (Esser et al., arXiv:2403.03206).

    t = f(u), f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), u uniform: the density has its mode in the middle of the
    time, and unlike the logit-normal it does not vanish at either end. The source proposes it for pre-training, with
    s = 1.29 among the best; here a step of the solver is as likely as the time that it covers,
    P(k) = f^-1(t_{k+1}) - f^-1(t_k).
    """

    name = "mode"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """`count` of the steps of the grid t [K + 1]."""
        mass = chances(t, self.options.scale).clamp_min(1e-300)
        count = min(self.options.count, len(mass))
        race = torch.empty(len(mass), dtype=torch.float64).exponential_(generator=generator)
        first = (mass.log() - race.log()).topk(count).indices  # the least of E_k / P(k), E_k exponential
        return StepPlan.training(first.sort().values, steps=len(mass), noise=self.options.noise)


def chances(t: Tensor, scale: float) -> Tensor:
    """[K] fp64 probability of each step of the grid t [K + 1], sum 1."""
    return _inverse(t.detach().cpu().double().clamp(0, 1), scale).diff()


def mode(u: Tensor, scale: float) -> Tensor:
    """f(u): falls from 1 to 0."""
    return 1 - u - scale * (torch.cos(math.pi * u / 2).square() - 1 + u)


def _inverse(t: Tensor, scale: float) -> Tensor:
    """u with f(u) = t, by halving [0, 1] until doubles end."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        above = mode(middle, scale) > t
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2
