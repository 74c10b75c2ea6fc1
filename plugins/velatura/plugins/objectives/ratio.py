"""What objectives with a likelihood ratio per step share.

A step of the rollout from x_t to x_next is a draw from N(mu(v), s^2); mu is affine in the velocity. OLD is the policy
that sampled, evaluated at the rollout's own states in the micro-batches of the update: before the first optimiser step
it is the current velocity itself, so the first ratio is exactly 1, whatever the rounding of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Kernel, Loss, Options, Points, Requirements, Role, Transition, VelaturaError
from velatura.plugins.objectives.velocity_kl import (
    average,
    latent_mean,
    norm_ratio,
    per_latent,
    weighted_sum,
    widened,
)

Convention = Literal["paper", "flow_grpo_code"]
"""Of the divergence of two steps: as the formula has it, or times the step size."""
NEEDS = Requirements(
    points="trajectory", roles=frozenset({Role.CURRENT, Role.OLD, Role.REFERENCE}), rollout_role=Role.OLD,
    advantage=True, stochastic_steps=True,
)  # fmt: skip


class RatioOptions(Options):
    """Options of every objective with a ratio per step."""

    max_advantage: float = Field(5.0, gt=0, description="Advantages are clipped to ± this.")
    kl: float = Field(0.0, ge=0, description="Coefficient of the KL to REFERENCE per step; 0 needs no reference.")
    kl_convention: Convention = Field(
        "paper",
        description="`paper`: mean (mu - mu_ref)^2 / (2 s^2), s the standard deviation of the step; `flow_grpo_code`: "
        "that times the step size, as released, so that published coefficients mean what they did there.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """N steps of the rollout under the current policy and under the one that sampled."""

    kernel: Kernel  # type: ignore[type-arg]
    x_next: Tensor
    """[N ...]."""
    current: Transition
    old: Transition

    @property
    def log_ratio(self) -> Tensor:
        """[N] log pi(x_next) - log pi_old(x_next), means over latent dimensions."""
        return self.kernel.log_prob(self.x_next, self.current) - self.log_prob_old

    @property
    def log_prob_old(self) -> Tensor:
        """[N] log pi_old(x_next), the mean over latent dimensions."""
        return self.kernel.log_prob(self.x_next, self.old)


def draw_of(points: Points, velocity: Mapping[Role, Tensor]) -> Draw:
    """The steps of `points` under CURRENT and OLD.

    Raises:
        VelaturaError: the points are not of a stochastic trajectory.
    """
    kernel, x_next = _step(points)
    old = transition(points, velocity[Role.OLD].detach())
    return Draw(kernel=kernel, x_next=x_next, current=transition(points, velocity[Role.CURRENT]), old=old)


def transition(points: Points, v: Tensor) -> Transition:
    """The steps [N ...] that velocities [N ...] make of the states of `points`."""
    kernel, x_next = _step(points)
    assert points.t_next is not None
    v = widened(v)
    x = points.x.to(v.dtype)
    return kernel.step(v, x, per_latent(points.t, x_next), per_latent(points.t_next, x_next))


def _step(points: Points) -> tuple[Kernel, Tensor]:  # type: ignore[type-arg]
    if points.kernel is None or points.x_next is None or not points.kernel.stochastic:
        raise VelaturaError("This objective learns from steps that drew noise, but the points carry none.")
    return points.kernel, points.x_next


def clipped_surrogate(points: Points, ratio: Tensor, options: RatioOptions, clip: float) -> tuple[Tensor, Tensor]:
    """-min(A rho, A clip(rho, 1 - c, 1 + c)), [N], and where the clip decides, [N]."""
    advantage = points.advantage.to(ratio.dtype).clamp(-options.max_advantage, options.max_advantage)
    return clipped(advantage, ratio, clip)


def clipped(advantage: Tensor, ratio: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-min(A rho, A clip(rho, 1 - c, 1 + c)), [N], of advantages [N], and where the clip decides, [N]."""
    free, held = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, held), (held > free).to(ratio.dtype)


def step_divergence(points: Points, v: Tensor, anchor: Tensor, convention: Convention) -> Tensor:
    """KL [N] of the steps that velocities v [N ...] make to those of `anchor` [N ...], which gets no gradient: the mean
    over latent dimensions of (mu - mu_anchor)^2 / (2 s^2), or that times the step size."""
    step, other = transition(points, v), transition(points, anchor.detach())
    kl = latent_mean(((step.mean - other.mean) / step.std).square()) / 2
    if convention == "paper":
        return kl
    assert points.t_next is not None
    return kl * (points.t - points.t_next).to(kl.dtype)


def surrogate_loss(
    points: Points, velocity: Mapping[Role, Tensor], draw: Draw, log_ratio: Tensor, options: RatioOptions, clip: float
) -> Loss:
    """The clipped surrogate of exp(log_ratio) [N], the KL, and what to look at."""
    policy, held = clipped_surrogate(points, log_ratio.exp(), options, clip)
    by_time = {"ratio": log_ratio.detach().exp(), "clipped": held}
    metrics = {
        "policy": average(policy, points),
        "ratio": average(log_ratio.exp(), points),
        "log_ratio": average(log_ratio, points),
        "clipped": average(held, points),
    }
    if points.log_prob is not None:
        again = draw.kernel.log_prob(draw.x_next, draw.old)
        metrics["rollout_gap"] = average((again - points.log_prob.to(again.dtype)).abs(), points)
    if not options.kl:
        return Loss(value=weighted_sum(policy, points), metrics=metrics, by_time=by_time)
    kl = step_divergence(points, velocity[Role.CURRENT], velocity[Role.REFERENCE], options.kl_convention)
    metrics["kl"] = average(kl, points)
    metrics["norm_ratio"] = average(norm_ratio(velocity[Role.CURRENT], velocity[Role.REFERENCE]), points)
    return Loss(value=weighted_sum(policy + options.kl * kl, points), metrics=metrics, by_time=by_time)


def roles_of(options: RatioOptions) -> frozenset[Role]:
    """REFERENCE only with a KL."""
    return NEEDS.roles - (frozenset() if options.kl else frozenset({Role.REFERENCE}))
