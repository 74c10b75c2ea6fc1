"""Advantage-weighted flow matching."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Options, Points, PolicyObjective, Requirements, Role
from velatura.plugins.objectives.velocity_kl import (
    Weighting,
    average,
    flow_target,
    norm_ratio,
    velocity_kl,
    weighted_error,
    weighted_sum,
    widened,
)


class AWMOptions(Options):
    """Options of `awm`."""

    weighting: Weighting = Field(
        "uniform",
        description="Negative log-likelihood of m = mean (v - u)^2: `uniform` m, `t` t m, "
        "`ghuber` 4 t ((m + 1e-10)^0.25 - 1e-10^0.25), whose gradient hardly depends on the size of m, `adaptive-l1` "
        "t m / mean |v - u|, whose gradient does not.",
    )
    clip_range: float | None = Field(
        None,
        gt=0,
        description="Clip the likelihood ratio to OLD to 1 ± this; null takes the samples as on-policy (ratio 1), "
        "as released.",
    )
    max_advantage: float = Field(5.0, gt=0, description="Advantages are clipped to ± this and divided by it.")
    kl: float = Field(1e-3, ge=0, description="Coefficient of the velocity KL to REFERENCE; 0 needs no reference.")
    ema_kl: float = Field(
        1.0, ge=0, description="Coefficient of the velocity KL to OLD, the policy that sampled; holds bad samples back."
    )
    old_decay_rate: float = Field(0.001, ge=0, description="The old policy's EMA decay grows by this each step.")
    old_decay_max: float = Field(0.3, ge=0, lt=1, description="The old policy's EMA decay never exceeds this.")


class AWM(PolicyObjective[AWMOptions]):
    """Flow matching on own samples, weighted by advantage (AWM, arXiv:2509.25050).

    log p = -weighting(v - u, t),   a = clip(A, -A_max, A_max) / A_max,   rho = exp(log p - sg log p_old),
    L_n = max(-a rho, -a clip(rho, 1 - c, 1 + c)) + kl mean (v - v_ref)^2 + ema_kl mean (v - v_old)^2.

    On-policy (`clip_range` null) log p_old is the current value itself: rho is 1 and dL/dv = 2 a w (v - u), over
    dims; OLD is then needed for `ema_kl` alone. Samples come from OLD, the EMA of the current policy (decay
    min(rate step, max); rate 0 makes it the current one): the ratio and the KL refer to the policy that sampled.
    With `uniform` and ema_kl >= 1 repeated steps cannot run away: the gradient is that of a quadratic in v whose
    curvature, a + ema_kl, is never negative.
    """

    name = "awm"
    requires = Requirements(
        roles=frozenset({Role.CURRENT, Role.OLD, Role.REFERENCE}), rollout_role=Role.OLD, advantage=True
    )

    def roles(self) -> frozenset[Role]:
        """REFERENCE only with a KL to it; OLD only with a ratio or a KL to it."""
        needed = {Role.CURRENT}
        if self.options.kl:
            needed.add(Role.REFERENCE)
        if self.options.ema_kl or self.options.clip_range is not None:
            needed.add(Role.OLD)
        return frozenset(needed)

    def old_decay(self, step: int) -> float:
        """min(rate step, max)."""
        return min(self.options.old_decay_rate * step, self.options.old_decay_max)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The surrogate and the KLs at N points."""
        current = widened(velocity[Role.CURRENT])
        policy, metrics = self._surrogate(points, current, velocity)
        total = policy
        if self.options.ema_kl:
            ema_kl = velocity_kl(current, velocity[Role.OLD])
            total = total + self.options.ema_kl * ema_kl
            metrics["ema_kl"] = average(ema_kl, points)
        if self.options.kl:
            kl = velocity_kl(current, velocity[Role.REFERENCE])
            total = total + self.options.kl * kl
            metrics["kl"] = average(kl, points)
            metrics["norm_ratio"] = average(norm_ratio(current, velocity[Role.REFERENCE]), points)
        return Loss(value=weighted_sum(total, points), metrics=metrics)

    def _surrogate(
        self, points: Points, current: Tensor, velocity: Mapping[Role, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped policy loss [N], and its metrics."""
        target, limit = flow_target(points), self.options.max_advantage
        advantage = points.advantage.to(current.dtype).clamp(-limit, limit) / limit
        log_p = -weighted_error(current - target, points.t, self.options.weighting)
        metrics = {"advantage": average(advantage.abs(), points), "log_likelihood": average(log_p, points)}
        if self.options.clip_range is None:
            return -advantage * (log_p - log_p.detach()).exp(), metrics
        log_old = -weighted_error(widened(velocity[Role.OLD].detach()) - target, points.t, self.options.weighting)
        ratio = (log_p - log_old).exp()
        clipped = ratio.clamp(1 - self.options.clip_range, 1 + self.options.clip_range)
        metrics["ratio"] = average(ratio, points)
        metrics["log_ratio"] = average(log_p - log_old, points)
        metrics["clipped"] = average((-advantage * clipped > -advantage * ratio).to(ratio.dtype), points)
        return torch.maximum(-advantage * ratio, -advantage * clipped), metrics
