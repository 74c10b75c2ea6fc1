"""Classifier-free guidance as a table over roles.

v^w = v(null) + w (v(cond) - v(null)) (Ho & Salimans, arXiv:2207.12598). A scale of exactly 1 is the conditional
velocity alone; the null branch is then not evaluated.

| policy         | ROLLOUT | CURRENT, OLD, REFERENCE | TEACHER |
|----------------|---------|-------------------------|---------|
| `none`         | 1       | 1                       | 1       |
| `both`         | w       | w                       | w       |
| `rollout-only` | w       | 1                       | 1       |
| `teacher-only` | 1       | 1                       | w       |
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import GuidancePolicy, NoOptions, Options, Role


class ScaleOptions(Options):
    """Options of every policy that guides something."""

    scale: float = Field(4.0, ge=0, description="Guidance scale w of the guided roles; 1 guides nothing.")


class NoGuidance(GuidancePolicy[NoOptions]):
    """The conditional velocity everywhere: one network row per state."""

    name = "none"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """Ones [N]."""
        return torch.ones_like(t)


class Both(GuidancePolicy[ScaleOptions]):
    """Every role guided, in the rollout as in the loss (Flow-GRPO, arXiv:2505.05470)."""

    name = "both"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """w [N] for all roles."""
        return torch.full_like(t, self.options.scale)


class RolloutOnly(GuidancePolicy[ScaleOptions]):
    """Hybrid guidance: what makes pictures is guided, what enters a loss is conditional only.

    Rewards judge guided pictures; CURRENT, OLD and REFERENCE are compared on their conditional branch, so training
    needs no null rows (Qwen-Image-2.0-RL, arXiv:2606.27608). The source says this of the trained policy; OLD and
    REFERENCE follow because a guided reference would pull guidance into the weights. A TEACHER, too, answers with its
    conditional branch: a student distilled so keeps needing guidance, unlike with `teacher-only`.

    A heuristic: the step is not the gradient of the guided policy. Evaluate at the scale of the rollout and at 1.
    """

    name = "rollout-only"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """w [N] for ROLLOUT, 1 for all others."""
        return torch.full_like(t, self.options.scale if role is Role.ROLLOUT else 1.0)


class TeacherOnly(GuidancePolicy[ScaleOptions]):
    """The teacher guided, everything of the student conditional: guidance is folded into the student.

    Use it with a distiller. The student then samples at scale 1; guiding it again acts like the product of the two
    scales (Qwen-Image-2.0-RL, arXiv:2606.27608; DanceOPD, arXiv:2606.27377).
    """

    name = "teacher-only"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """w [N] for TEACHER, 1 for all others."""
        return torch.full_like(t, self.options.scale if role is Role.TEACHER else 1.0)
