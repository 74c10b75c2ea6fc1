"""The objective `ram`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Options, Points, PolicyObjective, Requirements, Role, VelaturaError


class RAMOptions(Options):
    """Options of `ram`."""

    strength: float = Field(
        100.0,
        gt=0,
        description="m: how far an advantage of 1 moves the target, and so how little the reference holds it back.",
    )
    max_advantage: float = Field(5.0, gt=0, description="Advantages are clipped to ± this.")


class RAM(PolicyObjective[RAMOptions]):
    """Regression onto a target that the reward corrects (Reinforce Adjoint Matching, arXiv:2605.10759).

    L_n = mean (v - y)^2,   y = sg[v_ref + m A (u - v_old)],   u = eps - x_0.

    No ratio and no clip: where samples are as good as their group (A = 0) the target is the reference, and on the whole
    v - v_ref = m E[A (u - v_old) | x_t], the tilt of a policy whose KL to the reference costs 1 / m. Samples come from
    the current policy, which is OLD in the first update of a step. Clipping advantages is ours.
    """

    name = "ram"
    requires = Requirements(
        roles=frozenset({Role.CURRENT, Role.OLD, Role.REFERENCE}), rollout_role=Role.CURRENT, advantage=True
    )

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The regression at N points.

        Raises:
            VelaturaError: the points are visited states, which have no target.
        """
        if points.target is None:
            raise VelaturaError("objective 'ram' learns from re-noised finished samples, and these points have none")
        current = velocity[Role.CURRENT].float()
        old, reference = (velocity[role].detach().float() for role in (Role.OLD, Role.REFERENCE))
        advantage = points.advantage.float().clamp(-self.options.max_advantage, self.options.max_advantage)
        shift = self.options.strength * _wide(advantage, current) * (points.target.float() - old)
        error = _mean(current - (reference + shift))
        metrics = {
            "target_shift": _average(_mean(shift).sqrt(), points),
            "from_reference": _average(_mean(current.detach() - reference).sqrt(), points),
        }
        return Loss(value=(points.weight.float() * error).sum(), metrics=metrics)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[N] shaped against [N ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _mean(difference: Tensor) -> Tensor:
    """[N] mean square of [N ...] over latent dimensions."""
    return difference.square().flatten(1).mean(1)


def _average(values: Tensor, points: Points) -> Tensor:
    """[] over points, by their weight."""
    weight = points.weight.float()
    return (weight * values.detach()).sum() / weight.sum().clamp_min(1e-12)
