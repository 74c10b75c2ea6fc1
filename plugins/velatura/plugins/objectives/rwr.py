"""Reward-weighted regression."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Options, Points, PolicyObjective, Requirements, Role
from velatura.plugins.objectives.velocity_kl import average, flow_target, norm_ratio, velocity_kl, weighted_sum


class RWROptions(Options):
    """Options of `rwr`."""

    temperature: float = Field(1.0, gt=0, description="Of exp(A / temperature); higher treats all samples alike.")
    max_weight: float = Field(20.0, gt=0, description="No sample weighs more than this.")
    kl: float = Field(1e-3, ge=0, description="Coefficient of the velocity KL to REFERENCE; 0 needs no reference.")


class RWR(PolicyObjective[RWROptions]):
    """Flow matching on own samples, the good ones weighing more: a baseline without negative gradients.

    L_n = w mean (v - u)^2 + kl mean (v - v_ref)^2, w = min(exp(A / temperature), max_weight), u = eps - x_0
    (reward-weighted regression, Peters & Schaal 2007; for text-to-image Lee et al., arXiv:2302.12192). Samples as good
    as their group are still imitated (w = 1), so repeated rounds narrow what the policy draws; DiffusionNFT
    (arXiv:2509.16117) reports collapse without its negative part. Both defaults of the weight are ours.
    """

    name = "rwr"
    requires = Requirements(
        roles=frozenset({Role.CURRENT, Role.REFERENCE}), rollout_role=Role.CURRENT, advantage=True, contrast=False
    )

    def roles(self) -> frozenset[Role]:
        """REFERENCE only with a KL."""
        return self.requires.roles - (frozenset() if self.options.kl else frozenset({Role.REFERENCE}))

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The weighted regression and the KL at N points."""
        current = velocity[Role.CURRENT]
        error = velocity_kl(current, flow_target(points))
        log_weight = points.advantage.to(error.dtype) / self.options.temperature
        weight = log_weight.clamp_max(80).exp().clamp_max(self.options.max_weight)
        policy = weight * error
        metrics = {"flow_matching": average(error, points), "sample_weight": average(weight, points)}
        if not self.options.kl:
            return Loss(value=weighted_sum(policy, points), metrics=metrics)
        kl = velocity_kl(current, velocity[Role.REFERENCE])
        metrics["kl"] = average(kl, points)
        metrics["norm_ratio"] = average(norm_ratio(current, velocity[Role.REFERENCE]), points)
        return Loss(value=weighted_sum(policy + self.options.kl * kl, points), metrics=metrics)
