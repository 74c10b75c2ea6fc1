"""A distiller: an objective whose target is a teacher's velocity."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from velatura.api import Distiller, Loss, Options, Points, Requirements, Role


class HuberOptions(Options):
    """Options of `huber`."""

    delta: float = Field(1.0, gt=0, description="Differences beyond this count linearly.")


class Huber(Distiller[HuberOptions]):
    """Pull the student to its teacher, large differences no harder than middling ones.

    L_n = mean h(v_S - v_T), h(d) = delta^2 (sqrt(1 + (d / delta)^2) - 1). The teacher of a prompt is the one named like
    its task; override `teacher` for another rule.
    """

    name = "huber"
    requires = Requirements(points="trajectory", roles=frozenset({Role.CURRENT, Role.TEACHER}), advantage=False)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The weighted sum over N points."""
        ratio = (velocity[Role.CURRENT] - velocity[Role.TEACHER].detach()) / self.options.delta
        error = self.options.delta**2 * ((1 + ratio.square()).sqrt() - 1).flatten(1).mean(1)
        return Loss(value=(points.weight * error).sum(), metrics={"distance": error.detach().mean()})
