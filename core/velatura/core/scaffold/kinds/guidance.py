"""A guidance policy: which role is guided, and how strongly."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import GuidancePolicy, Options, Role


class IntervalOptions(Options):
    """Options of `interval`."""

    scale: float = Field(4.0, ge=0, description="Guidance scale within the interval; 1 guides nothing.")
    low: float = Field(0.2, ge=0, le=1, description="Pictures are guided from this time on,")
    high: float = Field(0.9, ge=0, le=1, description="up to this one; 1 is noise.")


class Interval(GuidancePolicy[IntervalOptions]):
    """Pictures are guided at middle times only; losses see the conditional velocity.

    CURRENT, OLD and REFERENCE have to be guided alike: they are compared with each other.
    """

    name = "interval"

    def scale(self, role: Role, t: Tensor) -> Tensor:
        """[N] for times t [N]."""
        inside = (t >= self.options.low) & (t <= self.options.high)
        guided = self.options.scale if role is Role.ROLLOUT else 1.0
        return torch.where(inside, guided, torch.ones_like(t))
