"""Negative-aware fine-tuning on the forward process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Options, Points, PolicyObjective, Requirements, Role
from velatura.plugins.objectives.velocity_kl import (
    ERROR_FLOOR,
    average,
    flow_target,
    latent_mean,
    norm_ratio,
    per_latent,
    velocity_kl,
    weighted_sum,
    widened,
)


class NFTOptions(Options):
    """Options of `nft`."""

    beta: float = Field(
        1.0,
        gt=0,
        description="Mix of current and old in the two implied policies; lower takes larger, less stable steps.",
    )
    max_advantage: float = Field(5.0, gt=0, description="Advantages are clipped to ± this and mapped to r in [0, 1].")
    kl: float = Field(1e-4, ge=0, description="Coefficient of the velocity KL to REFERENCE; 0 needs no reference.")
    normalise: Literal["adaptive", "none"] = Field(
        "adaptive",
        description="`adaptive`: errors in x_0, divided by their own mean size, times max_advantage / beta, as "
        "released (weighs noise like t); `none`: squared errors in velocity, as in the paper's formula.",
    )
    positive_only: bool = Field(
        False, description="Learn only from samples better than their group: advantages below 0 count as 0."
    )
    negative_part: bool = Field(
        True, description="Learn from the negative policy v-, too; false drops its term, which the source saw collapse."
    )
    old_decay_rate: float = Field(0.001, ge=0, description="The old policy's EMA decay grows by this each step.")
    old_decay_max: float = Field(0.5, ge=0, lt=1, description="The old policy's EMA decay never exceeds this.")


class NFT(PolicyObjective[NFTOptions]):
    """Contrast good and bad samples of the old policy in one regression (DiffusionNFT, arXiv:2509.16117).

    v+- = v_old +- beta (v - v_old),   r = clip(A, -A_max, A_max) / (2 A_max) + 1/2,
    L_n = r l(v+) + (1 - r) l(v-) + kl mean (v - v_ref)^2, where
      `none`      l(v) = mean (v - u)^2; then dL/dv = 2 beta^2 (v - v_old) + 2 beta (2r - 1)(v_old - u), over dims;
      `adaptive`  l(v) = A_max / beta * mean e^2 / max(sg mean |e|, 1e-5), e = t (v - u) = x_0 - x_0-estimate.

    u = eps - x_0 of samples of the old policy; r = 1/2 and v = v_old give a policy gradient of exactly 0. Only CURRENT
    carries gradient. The old policy follows the current one: old <- d old + (1 - d) current, d = min(rate step, max).
    Without `negative_part`, the source's ablation, L_n = r l(v+) + KL: bad samples are imitated less, not pushed away,
    and r = 1/2 moves the policy.
    """

    name = "nft"
    requires = Requirements(
        roles=frozenset({Role.CURRENT, Role.OLD, Role.REFERENCE}), rollout_role=Role.OLD, advantage=True
    )

    def __init__(self, options: NFTOptions | None = None) -> None:
        super().__init__(options)
        if not self.options.negative_part:
            self.requires = replace(self.requires, contrast=False)

    def roles(self) -> frozenset[Role]:
        """REFERENCE only with a KL."""
        return self.requires.roles - (frozenset() if self.options.kl else frozenset({Role.REFERENCE}))

    def old_decay(self, step: int) -> float:
        """min(rate step, max): young runs follow closely, later ones lag."""
        return min(self.options.old_decay_rate * step, self.options.old_decay_max)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The contrast and the KL at N points."""
        current, old = widened(velocity[Role.CURRENT]), widened(velocity[Role.OLD].detach())
        target = flow_target(points)
        shift = self.options.beta * (current - old)  # not beta v + (1 - beta) v_old: exactly 0 where v = v_old
        positive = self._error(old + shift - target, points.t)
        negative = self._error(old - shift - target, points.t)
        limit = self.options.max_advantage
        least = 0.5 if self.options.positive_only else 0.0
        r = (points.advantage.to(current.dtype) / (2 * limit) + 0.5).clamp(least, 1)
        policy = r * positive + (1 - r) * negative * self.options.negative_part
        metrics = {
            "policy": average(policy, points),
            "positive": average(positive, points),
            "negative": average(negative, points),
            "contrast": average((2 * r - 1).abs(), points),
            "distance_to_old": average(velocity_kl(current, old), points),
        }
        if not self.options.kl:
            return Loss(value=weighted_sum(policy, points), metrics=metrics)
        reference = velocity[Role.REFERENCE]
        kl = velocity_kl(current, reference)
        metrics |= {"kl": average(kl, points), "norm_ratio": average(norm_ratio(current, reference), points)}
        return Loss(value=weighted_sum(policy + self.options.kl * kl, points), metrics=metrics)

    def _error(self, difference: Tensor, t: Tensor) -> Tensor:
        """l [N] of v - u [N ...]."""
        if self.options.normalise == "none":
            return latent_mean(difference.square())
        error = per_latent(t, difference) * difference
        size = latent_mean(error.detach().abs().double()).clamp_min(ERROR_FLOOR).to(error.dtype)
        return self.options.max_advantage / self.options.beta * latent_mean(error.square()) / size
