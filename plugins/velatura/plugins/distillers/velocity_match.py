"""On-policy distillation by matching velocities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Distiller, Loss, Options, Points, Prompt, Requirements, Role, VelaturaError
from velatura.plugins.objectives.velocity_kl import average, latent_mean, norm_ratio, velocity_kl, weighted_sum, widened


class VelocityMatchOptions(Options):
    """Options of `velocity-match`."""

    weight: Literal["uniform", "dt", "dt2"] = Field(
        "uniform",
        description="Weight of a state, with D = t - t_next: `uniform` 1 (the published sum), `dt` D (an integral "
        "over time on any grid), `dt2` D^2 / 2 (the step's displacement).",
    )
    route: Literal["task", "category"] = Field(
        "task", description="The teacher of a prompt is the one named like its task, or like its category."
    )


class VelocityMatch(Distiller[VelocityMatchOptions]):
    """Pull the student's velocity to its teacher's at the states the student visits.

    L_n = omega_n mean (v_S(x_t, t, c) - sg v_T(x_t, t, c))^2, x_t on the student's own ODE trajectory, through which
    no gradient flows (Qwen-Image-2.0-RL, arXiv:2606.27608). omega is 1, D (the Wasserstein bound of
    arXiv:2305.16860, time integral over student states) or D^2 / 2 (DiffusionOPD, arXiv:2605.15055). With the
    guidance policy `teacher-only` v_S is conditional and v_T guided, which folds guidance into the student.
    0 exactly where the velocities agree.
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
        return prompt.task if self.options.route == "task" else prompt.category

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
        weighted = self._step_weight(points).to(distance.dtype) * distance
        return Loss(value=weighted_sum(weighted, points), metrics=metrics)

    def _step_weight(self, points: Points) -> Tensor:
        """omega [N]."""
        if self.options.weight == "uniform":
            return torch.ones_like(points.t)
        if points.t_next is None:
            raise VelaturaError(
                f"velocity-match with weight: {self.options.weight} needs the next time of every state."
            )
        step = points.t - points.t_next
        return step if self.options.weight == "dt" else step.square() / 2
