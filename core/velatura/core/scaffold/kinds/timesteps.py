"""A timestep sampler: which steps of the grid are trained."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Options, StepPlan, TimestepSampler


class WindowOptions(Options):
    """Options of `window`."""

    count: int = Field(3, ge=1, description="How many steps in a row are trained; all, where the grid has fewer.")


class Window(TimestepSampler[WindowOptions]):
    """A run of neighbouring steps, at a random place."""

    name = "window"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """Steps of the grid t [K + 1]. Draw with `generator` alone: every process has the same."""
        steps = len(t) - 1
        count = min(self.options.count, steps)
        first = int(torch.randint(steps - count + 1, (), generator=generator))
        return StepPlan.training(torch.arange(first, first + count), steps=steps)
