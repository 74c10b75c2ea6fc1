"""An objective: a loss in velocities by role."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Options, Points, PolicyObjective, Requirements, Role


class PullOptions(Options):
    """Options of `pull`."""

    hold: float = Field(1.0, ge=0, description="How strongly the old policy is held on to.")


class Pull(PolicyObjective[PullOptions]):
    """Regress to good samples, away from bad ones, and stay near the old policy.

    L_n = A_n mean (v - u)^2 + hold mean (v - v_old)^2, u = eps - x_0 of the sample. The value is the sum over points
    of weight_n L_n: nothing may be divided by what else is in the micro-batch.
    """

    name = "pull"
    requires = Requirements(roles=frozenset({Role.CURRENT, Role.OLD}), rollout_role=Role.OLD)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The weighted sum over N points; only CURRENT carries gradient."""
        assert points.target is not None  # `forward` points, the default of `requires`, have one
        current, old = velocity[Role.CURRENT], velocity[Role.OLD].detach()
        error = (current - points.target).square().flatten(1).mean(1)
        away = (current - old).square().flatten(1).mean(1)
        value = (points.weight * (points.advantage * error + self.options.hold * away)).sum()
        return Loss(value=value, metrics={"distance_to_old": away.detach().mean()})
