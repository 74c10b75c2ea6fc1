"""Classifier-free guidance as a table over roles.

v^w = v(null) + w (v(cond) - v(null)) (Ho & Salimans, arXiv:2207.12598). A scale of exactly 1 is the conditional
velocity alone; the null branch is then not evaluated.

| policy            | ROLLOUT | CURRENT, OLD, EMA, REFERENCE | TEACHER, ANCHOR |
|-------------------|---------|------------------------------|-----------------|
| `none`            | 1       | 1                            | 1               |
| `both`            | w       | w                            | w               |
| `detached-uncond` | w       | w                            | w               |
| `rollout-only`    | w       | 1                            | 1               |
| `teacher-only`    | 1       | 1                            | w               |

`interval` is one of `both`, `rollout-only` and `teacher-only` for a part of the time, and `none` outside of it.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from velatura.api import GuidancePolicy, NoOptions, Options, Role

TEACHERS = (Role.TEACHER, Role.ANCHOR)
"""Finished models that a student is pulled to: guided alike, else an anchor would pull guidance out again."""


class ScaleOptions(Options):
    """Options of every policy that guides something."""

    scale: float = Field(4.0, ge=0, description="Guidance scale w of the guided roles; 1 guides nothing.")


class IntervalOptions(ScaleOptions):
    """Options of `interval`."""

    low: float = Field(0.1, ge=0, le=1, description="Least time that is guided.")
    high: float = Field(0.8, ge=0, le=1, description="Largest time that is guided.")
    roles: Literal["both", "rollout-only", "teacher-only"] = Field(
        "rollout-only", description="Whose velocities are guided, as under the policy of this name."
    )

    @model_validator(mode="after")
    def _has_times(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}: no time would be guided")
        return self


class NoGuidance(GuidancePolicy[NoOptions]):
    """The conditional velocity everywhere: w = 1 for every role, one network row per state.

    What DiffusionNFT (arXiv:2509.16117) and AWM (arXiv:2509.25050) train with. Of a model that was made to be guided
    the report of Qwen-Image-2.0-RL (arXiv:2606.27608) says that reward rises so while style and knowledge are lost.
    """

    name = "none"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """Ones [N]."""
        return torch.ones_like(t)


class Both(GuidancePolicy[ScaleOptions]):
    """Every role guided, in the rollout as in the loss (Flow-GRPO, arXiv:2505.05470).

    v^w = v(null) + w (v(cond) - v(null)) (Ho & Salimans, arXiv:2207.12598). The report of Qwen-Image-2.0-RL
    (arXiv:2606.27608) saw it become unstable and collapse.
    """

    name = "both"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """w [N] for all roles."""
        return torch.full_like(t, self.options.scale)


class RolloutOnly(GuidancePolicy[ScaleOptions]):
    """Hybrid guidance: what makes pictures is guided, what enters a loss is conditional only.

    w = scale for ROLLOUT, w = 1 for all others. Rewards judge guided pictures; CURRENT, OLD and REFERENCE are compared
    on their conditional branch, so training needs no null rows (Qwen-Image-2.0-RL, arXiv:2606.27608). The source says
    this of the trained policy; OLD and REFERENCE follow because a guided reference would pull guidance into the
    weights. A TEACHER, too, answers with its conditional branch: a student distilled so keeps needing guidance, unlike
    with `teacher-only`, and itself draws under the guidance of its loss.

    A heuristic: the step is not the gradient of the guided policy. Evaluate at the scale of the rollout and at 1.
    """

    name = "rollout-only"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """w [N] for ROLLOUT, 1 for all others."""
        return torch.full_like(t, self.options.scale if role is Role.ROLLOUT else 1.0)


class TeacherOnly(GuidancePolicy[ScaleOptions]):
    """The teacher guided, everything of the student conditional: guidance is folded into the student.

    w = scale for TEACHER and ANCHOR, w = 1 for all others. Use it with a distiller. The student then samples at scale
    1; guiding it again acts like the product of the two scales (Qwen-Image-2.0-RL, arXiv:2606.27608; DanceOPD,
    arXiv:2606.27377).
    """

    name = "teacher-only"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """w [N] for TEACHER and ANCHOR, 1 for all others."""
        return torch.full_like(t, self.options.scale if role in TEACHERS else 1.0)


class DetachedUncond(GuidancePolicy[ScaleOptions]):
    """Every role guided, but only the conditional branch learns.

    v^w = sg v(null) + w (v(cond) - sg v(null)): the velocities are those of `both`; the gradient of the unconditional
    branch is dropped, so dv^w is w dv(cond) and the null prompt is not trained on purpose (earlier code of Flow-GRPO,
    arXiv:2505.05470). What the branches share, with one network, still moves both.
    """

    name = "detached-uncond"
    detach_null = True

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """w [N] for all roles."""
        return torch.full_like(t, self.options.scale)


class Interval(GuidancePolicy[IntervalOptions]):
    """Guidance for a part of the time: w = scale where low <= t <= high, else 1 (Kynkaanniemi, arXiv:2404.07724).

    Guiding pure noise costs variety and guiding the last steps does little; each step outside the interval costs one
    network row instead of two. The source's interval is in noise levels of another parametrisation: the defaults are
    ours. What an exported model says of its guidance is the scale, not the interval.
    """

    name = "interval"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """w [N] for the guided roles at times within the interval, 1 otherwise."""
        options = self.options
        guided = {
            "both": True, "rollout-only": role is Role.ROLLOUT, "teacher-only": role in TEACHERS
        }[options.roles]  # fmt: skip
        inside = (t >= options.low) & (t <= options.high) & guided
        return torch.where(inside, options.scale, 1.0).to(t)
