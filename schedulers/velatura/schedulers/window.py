"""A few steps side by side: only there is noise drawn and anything learned."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import StepPlan, TimestepSampler, VelaturaError
from velatura.schedulers.timesteps import NoiseOptions


class WindowOptions(NoiseOptions):
    """Options of `window`."""

    width: int = Field(4, ge=1, description="Steps in the window.")
    place: Literal["fixed", "random", "sliding"] = Field(
        "sliding",
        description="`fixed`: always at `start`; `random`: anywhere from `start` within the first `within` of the "
        "grid; `sliding`: from `start` towards the picture, `stride` steps every `every` rounds, and then at the end.",
    )
    start: int = Field(0, ge=0, description="Its first step, or the first that it may have; 0 starts at pure noise.")
    within: float = Field(0.5, gt=0, le=1, description="For `random`: the share of the steps that it stays in.")
    every: int = Field(25, ge=1, description="For `sliding`: rounds of the loop between two moves.")
    stride: int = Field(1, ge=1, description="For `sliding`: steps that it moves by.")


class Window(TimestepSampler[WindowOptions]):
    """`width` consecutive steps carry the gradient and the noise; before and after them the ODE.

    It begins at `start` (fixed), at a step drawn from start .. floor(within K) - width, all equally likely (random), or
    in round l at min(start + stride floor(l / every), K - width) (sliding); the grid has K steps.

    Sliding from high to low noise is MixGRPO (arXiv:2507.21802: width 4 of 25, one step every 25 rounds); a random
    place in the first half is the fast variant in Flow-GRPO's code (arXiv:2505.05470: width 2 or 3). With `width: 1`
    the picture's reward is credited to the one step that drew noise, as in TempFlow-GRPO (arXiv:2508.04324). Once a
    sliding window has reached the last step it stays there, which is our choice.
    """

    name = "window"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """The window of the first round on the grid t [K + 1]."""
        return self.plan_at(0, t, generator)

    def plan_at(self, step: int, t: Tensor, generator: torch.Generator) -> StepPlan:
        """The window of round `step` on the grid t [K + 1].

        Raises:
            VelaturaError: it does not fit on the grid.
        """
        steps, options = len(t) - 1, self.options
        if wrong := self.complaint(steps):
            raise VelaturaError(f"timesteps '{self.name}': {wrong}")
        first = options.start
        if options.place == "random":
            last = self._room(steps) - options.width
            first = int(torch.randint(options.start, last + 1, (), generator=generator))
        elif options.place == "sliding":
            first = min(options.start + options.stride * (step // options.every), steps - options.width)
        return StepPlan.training(torch.arange(first, first + options.width), steps=steps, noise=options.noise)

    def complaint(self, steps: int) -> str:
        """A window that ends behind the grid, or behind the share of it that it may move in."""
        options, room = self.options, self._room(steps)
        if options.start + options.width <= room:
            return ""
        part = f"the first {options.within:g} of the grid, {room} of its {steps} steps"
        return (
            f"a window of {options.width} step(s) from step {options.start} does not fit on "
            f"{part if options.place == 'random' else f'the grid of {steps} steps'}. Take a smaller width or start, or "
            f"more sampling.steps."
        )

    def _room(self, steps: int) -> int:
        """How many steps from the first on the window may cover."""
        return max(1, int(self.options.within * steps)) if self.options.place == "random" else steps
