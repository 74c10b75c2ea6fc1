"""Supervised flow matching."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from velatura.api import Loss, NoOptions, Points, PolicyObjective, Requirements, Role
from velatura.plugins.objectives.velocity_kl import average, flow_target, norm_ratio, velocity_kl, weighted_sum


class SFT(PolicyObjective[NoOptions]):
    """Regress the velocity to that of the straight path from noise to a given picture.

    L_n = mean (v - u)^2, u = eps - x_0 (Lipman et al., Flow Matching, arXiv:2210.02747; Liu et al.,
    arXiv:2209.03003). Needs neither rewards nor any policy but the current one; its floor is the variance of u given
    x_t, not 0. Non-negative.
    """

    name = "sft"
    requires = Requirements(roles=frozenset({Role.CURRENT}), rollout_role=Role.CURRENT, advantage=False)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """Mean squared distance of CURRENT [N ...] to the target of `points`."""
        target = flow_target(points)
        error = velocity_kl(velocity[Role.CURRENT], target)
        metrics = {
            "flow_matching": average(error, points),
            "norm_ratio_to_target": average(norm_ratio(velocity[Role.CURRENT], target), points),
        }
        return Loss(value=weighted_sum(error, points), metrics=metrics)
