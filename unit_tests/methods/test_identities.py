"""Identities between velocities, pictures and losses that belong to no single component."""

from __future__ import annotations

import torch
from torch import Tensor

from velatura.api import Points, Role
from velatura.plugins.distillers.velocity_match import VelocityMatch, VelocityMatchOptions
from velatura.plugins.objectives.nft import NFT, NFTOptions
from velatura.plugins.objectives.velocity_kl import weighted_error

N, D = 5, 7


def random(seed: int) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points() -> Points:
    t, x0, eps = torch.linspace(0, 1, N).double(), random(0), random(1)
    return Points(
        x=(1 - t[:, None]) * x0 + t[:, None] * eps, t=t, x0=x0, target=eps - x0, t_next=(t - 0.1).clamp_min(0),
        advantage=torch.linspace(-6, 6, N).double(), weight=torch.full((N,), 1 / N, dtype=torch.float64),
    )  # fmt: skip


def test_an_error_of_the_estimated_picture_is_that_of_the_velocity_times_t() -> None:
    where, v = points(), random(2)
    assert where.x0 is not None and where.target is not None
    estimate = where.x - where.t[:, None] * v
    torch.testing.assert_close(estimate - where.x0, where.t[:, None] * (where.target - v), atol=1e-14, rtol=1e-12)


def test_the_adaptive_form_of_nft_has_the_weight_of_adaptive_l1() -> None:
    """With every sample good (r = 1) and beta 1 it is A_max times the adaptive error of the current velocity."""
    where = points()
    assert where.target is not None
    where = Points(**{name: getattr(where, name) for name in ("x", "t", "target", "weight")}, advantage=where.t * 0 + 9)
    v, old = random(2), random(3)
    loss = NFT(NFTOptions(kl=0)).loss(where, {Role.CURRENT: v, Role.OLD: old}).value
    adaptive = 5 * weighted_error(v - where.target, where.t, "adaptive-l1")
    torch.testing.assert_close(loss, adaptive.mean(), atol=1e-12, rtol=1e-6)


def test_half_the_square_of_an_euler_step_is_velocity_matching_with_weight_dt2() -> None:
    """|x'_S - x'_T|^2 / 2 of two Euler steps from one state (DiffusionOPD on the ODE)."""
    where, student, teacher = points(), random(2), random(3)
    assert where.t_next is not None
    step = (where.t_next - where.t)[:, None]
    apart = ((where.x + step * student) - (where.x + step * teacher)).square().mean(1) / 2
    matched = VelocityMatch(VelocityMatchOptions(weight="dt2"))
    value = matched.loss(where, {Role.CURRENT: student, Role.TEACHER: teacher}).value
    torch.testing.assert_close(value, apart.mean(), atol=1e-14, rtol=1e-10)
