"""Which solver steps carry gradient.

Training on every step of the sampler invites the policy to write texture for the judge in the last, low-noise steps;
a subset near t = 1 decides what is in the picture (Qwen-Image-2.0-RL, arXiv:2606.27608).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Options, StepPlan, TimestepSampler, VelaturaError


class NoiseOptions(Options):
    """Options of every sampler of steps."""

    noise: Literal["trained", "all"] = Field(
        "trained",
        description="With a kernel that draws noise: on which steps; the others follow the ODE. `ode` never draws any.",
    )


class AllOptions(NoiseOptions):
    """Options of `all`."""

    drop_first: bool = Field(False, description="Leave out step 0, which starts at t = 1 exactly, from pure noise.")


class UniformOptions(NoiseOptions):
    """Options of `uniform`."""

    count: int = Field(6, ge=1, description="How many steps to train on; all there are when the grid has fewer.")
    drop_first: bool = Field(True, description="Leave out step 0, which starts at t = 1 exactly, from pure noise.")


class HighNoiseOptions(UniformOptions):
    """Options of `high-noise`."""

    power: float = Field(2.0, ge=0, description="0 draws uniformly; higher favours noise.")
    floor: float = Field(0.0, ge=0, lt=1, description="Steps that start below this time are never trained on.")


class StratifiedOptions(UniformOptions):
    """Options of `stratified`."""

    within: float = Field(
        1.0, gt=0, le=1, description="Share of the grid, from noise on, that is trained on: 0.9 leaves out the end."
    )


class All(TimestepSampler[AllOptions]):
    """Every step k = 0 .. K - 1 of the grid.

    What the released code of Flow-GRPO (arXiv:2505.05470) and DiffusionNFT (arXiv:2509.16117) trains on, less the last
    of a few (a fraction of 0.99). Qwen-Image-2.0-RL (arXiv:2606.27608) saw it lead to reward hacking in a few rounds.
    """

    name = "all"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """Steps 0..K-1 of the grid t [K + 1]."""
        train = candidates(t, self.options.drop_first, floor=0.0)
        return StepPlan.training(train, steps=len(t) - 1, noise=self.options.noise)

    def complaint(self, steps: int) -> str:
        """A grid of which no step is left."""
        return none_left(self.options, steps)


class Uniform(TimestepSampler[UniformOptions]):
    """`count` steps without replacement, all equally likely.

    P(k) = count / C for each of the C steps that may be trained on. DanceGRPO (arXiv:2505.07818) trains on six steps of
    ten so; beside `high-noise` it is the baseline.
    """

    name = "uniform"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """`count` of the steps of the grid t [K + 1]."""
        steps = candidates(t, self.options.drop_first, floor=0.0)
        train = draw(steps, torch.zeros(len(steps), dtype=torch.float64), self.options.count, generator)
        return StepPlan.training(train, steps=len(t) - 1, noise=self.options.noise)

    def complaint(self, steps: int) -> str:
        """A grid of which no step is left."""
        return none_left(self.options, steps)


class HighNoise(TimestepSampler[HighNoiseOptions]):
    """`count` steps without replacement, step k drawn in proportion to t_k ** power.

    The source asks for a subset weighted towards t = 1 and leaves count and density open (arXiv:2606.27608); dropping
    t = 1 itself follows AWM (arXiv:2509.25050).
    """

    name = "high-noise"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """`count` of the steps of the grid t [K + 1], mostly noisy ones."""
        steps = candidates(t, self.options.drop_first, self.options.floor)
        log_weight = self.options.power * t.detach().cpu().double()[steps].log()
        train = draw(steps, log_weight, self.options.count, generator)
        return StepPlan.training(train, steps=len(t) - 1, noise=self.options.noise)

    def complaint(self, steps: int) -> str:
        """A grid of which no step is left."""
        return none_left(self.options, steps)


class Stratified(TimestepSampler[StratifiedOptions]):
    """One step from each of `count` parts of the grid, side by side and of equal length, give or take a step.

    Of the C steps that may be trained on, sorted, part i has those at k with floor(i C / M) <= k < floor((i + 1) C /
    M), M = count, and one of them is drawn, all equally likely. So every round looks at all of the time, where
    `uniform` may look at one end twice. AWM's released configuration (arXiv:2509.25050) takes 6 of 14 steps so, without
    the first and without the last tenth: `count: 6, within: 0.9`. Step k may be trained on when k < floor(within K).
    """

    name = "stratified"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """`count` of the steps of the grid t [K + 1]."""
        steps = candidates(t, self.options.drop_first, floor=0.0)
        inside = steps[steps < self._end(len(t) - 1)]
        if wrong := self.complaint(len(t) - 1):
            raise VelaturaError(f"timesteps '{self.name}': {wrong}")
        count = min(self.options.count, len(inside))
        bounds = torch.arange(count + 1) * len(inside) // count
        share = torch.rand(count, dtype=torch.float64, generator=generator)
        train = inside[bounds[:-1] + (share * (bounds[1:] - bounds[:-1])).long()]
        return StepPlan.training(train, steps=len(t) - 1, noise=self.options.noise)

    def complaint(self, steps: int) -> str:
        """A share of the grid in which no step is left."""
        if self._end(steps) > int(self.options.drop_first):
            return ""
        return (
            f"within {self.options.within:g} of {steps} step(s) leaves none to train on"
            f"{' beside the first, which drop_first leaves out' if self.options.drop_first else ''}. Take a larger "
            f"share, or more sampling.steps."
        )

    def _end(self, steps: int) -> int:
        """One past the last step that may be trained on; the small term undoes binary rounding of the share."""
        return int(self.options.within * steps + 1e-9)


def none_left(options: AllOptions | UniformOptions, steps: int) -> str:
    """What to say where the first of `steps` steps is left out, and there is no other; empty where there is."""
    if steps > int(options.drop_first):
        return ""
    return (
        "a grid of one step leaves none to train on beside the first, which drop_first leaves out. Set drop_first: "
        "false, or take more sampling.steps."
    )


def candidates(t: Tensor, drop_first: bool, floor: float) -> Tensor:
    """Sorted indices [C] of the steps that may be trained on."""
    start = t.detach().cpu()[:-1]
    allowed = (start > 0) & (start >= floor)
    if drop_first:
        allowed[:1] = False
    steps = torch.nonzero(allowed).flatten()
    if len(steps) == 0:
        raise VelaturaError(
            f"No step is left to train on: the grid has {len(start)} step(s), drop_first is {drop_first} and "
            f"floor is {floor:g}. Use more solver steps, a lower floor, or drop_first: false."
        )
    return steps


def draw(steps: Tensor, log_weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `steps` [C] without replacement, in proportion to exp(log_weight) [C]; sorted.

    An exponential race in logarithms: the smallest E_k / w_k win, E_k ~ Exp(1). Unlike `torch.multinomial` it takes
    weights that underflow.
    """
    race = torch.empty(len(steps), dtype=torch.float64).exponential_(generator=generator).log()
    winners = (log_weight - race).topk(min(count, len(steps))).indices
    return steps[winners].sort().values
