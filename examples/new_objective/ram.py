"""A new objective in one file: regress to the reference, shifted along the advantage (RAM, arXiv:2605.10759)."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Options, Points, PolicyObjective, Requirements, Role, hookimpl


class RAMOptions(Options):
    """Options of `ram`."""

    gain: float = Field(1.0, gt=0, description="How far a sample of advantage 1 moves the target; the source has 100.")
    max_advantage: float = Field(5.0, gt=0, description="Advantages are clipped to ± this.")


class RAM(PolicyObjective[RAMOptions]):
    """Regress the velocity to that of the reference, moved towards good samples and away from bad ones.

    L_n = mean (v - [v_ref + gain A (u - v_old)])^2, u = eps - x_0 of samples that OLD drew; the target has no gradient.
    dL/dv = 2 (v - v_ref) - 2 gain A (u - v_old), over dims: at v = v_ref = v_old it is that of `nft` up to a constant.
    """

    name = "ram"
    requires = Requirements(roles=frozenset({Role.CURRENT, Role.OLD, Role.REFERENCE}), rollout_role=Role.OLD)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The regression at N re-noised samples [N ...]; a scalar, weighted by `points.weight`."""
        assert points.target is not None  # what `requires.points`, "forward" by default, promises
        current, old, reference = (velocity[r].float() for r in (Role.CURRENT, Role.OLD, Role.REFERENCE))
        limit = self.options.max_advantage
        advantage = points.advantage.clamp(-limit, limit).reshape(-1, *[1] * (current.ndim - 1))
        shift = self.options.gain * advantage * (points.target - old)
        error = (current - (reference + shift).detach()).square().flatten(1).mean(1)
        moved = (current - reference).detach().square().flatten(1).mean(1)
        share = points.weight.sum().clamp_min(1e-12)
        return Loss(
            value=(points.weight * error).sum(),
            metrics={"kl": (points.weight * moved).sum() / share},  # plain numbers, averaged over micro-batches
            by_time={"kl": moved},  # a number per point, reported by quarter of the time
        )


@hookimpl
def velatura_objective() -> list[type[RAM]]:
    """What this plugin offers."""
    return [RAM]
