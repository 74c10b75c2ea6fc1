"""On-policy distillation by matching velocities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Distiller, Loss, Points, Prompt, Requirements, Role, VelaturaError
from velatura.plugins.distillers.routing import RouteOptions, routed
from velatura.plugins.objectives.velocity_kl import (
    average,
    latent_mean,
    norm_ratio,
    velocity_kl,
    weighted_error,
    weighted_sum,
    widened,
)


class VelocityMatchOptions(RouteOptions):
    """Options of `velocity-match`."""

    weight: Literal["uniform", "dt", "dt2", "t", "ghuber", "adaptive-l1"] = Field(
        "uniform",
        description="Weight of a state, with D = t - t_next: `uniform` 1 (the published sum), `dt` D (an integral "
        "over time on any grid), `dt2` D^2 / 2 (the step's displacement); `t`, or of its own error e, m = mean e^2: "
        "`ghuber` 4 t ((m + 1e-10)^0.25 - 1e-10^0.25), `adaptive-l1` t m / mean |e| in place of m.",
    )


class VelocityMatch(Distiller[VelocityMatchOptions]):
    """Pull the student's velocity to its teacher's at the states the student visits.

    L_n = omega_n mean (v_S(x_t, t, c) - sg v_T(x_t, t, c))^2, x_t on the student's own ODE trajectory, through which
    no gradient flows (Qwen-Image-2.0-RL, arXiv:2606.27608). omega is 1, D (the Wasserstein bound of
    arXiv:2305.16860, time integral over student states) or D^2 / 2 (DiffusionOPD, arXiv:2605.15055). With the
    guidance policy `teacher-only` v_S is conditional and v_T guided, which folds guidance into the student.
    Which states are asked for is said by the stage's timesteps: all of them (dense), or one a sample, late in the
    rollout (DanceOPD, arXiv:2606.27377: timesteps `beta` with `over: steps, count: 1`). 0 exactly where the velocities
    agree.
    """

    name = "velocity-match"
    requires = Requirements(
        points="trajectory",
        roles=frozenset({Role.CURRENT, Role.TEACHER}),
        rollout_role=Role.CURRENT,
        advantage=False,
    )

    def teacher(self, prompt: Prompt) -> str:
        """The prompt's task, or its category."""
        return routed(self.options, prompt)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """Weighted mean squared distance of CURRENT to TEACHER, both [N ...]."""
        student, teacher = velocity[Role.CURRENT], velocity[Role.TEACHER].detach()
        distance = velocity_kl(student, teacher)
        size = latent_mean(widened(teacher).square()).clamp_min(torch.finfo(distance.dtype).tiny)
        metrics = {
            "distance": average(distance, points),
            "relative_distance": average(distance / size, points),
            "norm_ratio": average(norm_ratio(student, teacher), points),
        }
        weighted = self._weighted(points, widened(student) - widened(teacher))
        return Loss(value=weighted_sum(weighted, points), metrics=metrics, by_time={"distance": distance.detach()})

    def _weighted(self, points: Points, error: Tensor) -> Tensor:
        """The loss [N] of errors [N ...]."""
        weight = self.options.weight
        if weight != "dt" and weight != "dt2":
            return weighted_error(error, points.t, weight)
        if points.t_next is None:
            raise VelaturaError(f"velocity-match with weight: {weight} needs the next time of every state.")
        step = (points.t - points.t_next).to(error.dtype)
        return (step if weight == "dt" else step.square() / 2) * latent_mean(error.square())
