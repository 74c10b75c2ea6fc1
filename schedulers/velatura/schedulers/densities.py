"""Trained steps drawn by a density over time: a step is as likely as the time that it covers.

The probability of step k is the mass of [t_{k+1}, t_k] under the density, so a shifted grid, whose steps are long at
one end, is sampled like an even one. Steps are drawn without replacement, so a large `count` flattens the density.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import StepPlan, TimestepSampler
from velatura.schedulers.timesteps import UniformOptions, candidates, draw, none_left


class BetaOptions(UniformOptions):
    """Options of `beta`."""

    a: float = Field(2.0, gt=0, description="Density t^(a-1) (1-t)^(b-1): with a > b mostly noise.")
    b: float = Field(5.0, gt=0, description="See `a`; with b > a mostly pictures that are almost done.")
    over: Literal["time", "steps"] = Field(
        "time",
        description="What the density is over: `time` t itself; `steps` the share of the rollout still to come, "
        "(K - k) / K at step k, which on a shifted grid is another thing.",
    )


class LogitNormalOptions(UniformOptions):
    """Options of `logit-normal`."""

    mean: float = Field(0.0, description="Of logit t; above 0 favours noise.")
    std: float = Field(1.0, gt=0, description="Of logit t.")


class Beta(TimestepSampler[BetaOptions]):
    """`count` steps without replacement, drawn by a Beta(a, b) density over time or over the rollout.

    P(k) = I(t_k) - I(t_{k+1}), I the regularised incomplete beta function. DanceOPD (arXiv:2606.27377) asks its
    teacher at one step at Beta(5, 2) along the rollout, towards its end: `over: steps, count: 1` with the defaults
    a = 2, b = 5, because time here runs from 1 to 0.
    """

    name = "beta"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """`count` of the steps of the grid t [K + 1]."""
        from scipy.special import betainc

        options = self.options
        grid = t.detach().cpu().double() if options.over == "time" else torch.linspace(1, 0, len(t)).double()
        below = torch.from_numpy(betainc(options.a, options.b, grid.clamp(0, 1).numpy()))
        return _by_mass(below, t, options, generator)

    def complaint(self, steps: int) -> str:
        """A grid of which no step is left."""
        return none_left(self.options, steps)


class LogitNormal(TimestepSampler[LogitNormalOptions]):
    """`count` steps without replacement, drawn by a logit-normal density: logit t ~ N(mean, std^2).

    P(k) = Phi((logit t_k - mean) / std) - Phi((logit t_{k+1} - mean) / std) (Esser et al., arXiv:2403.03206, for
    pre-training; AWM, arXiv:2509.25050, offers it for reinforcement learning).
    """

    name = "logit-normal"

    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """`count` of the steps of the grid t [K + 1]."""
        score = (t.detach().cpu().double().logit() - self.options.mean) / self.options.std
        return _by_mass(torch.special.ndtr(score), t, self.options, generator)

    def complaint(self, steps: int) -> str:
        """A grid of which no step is left."""
        return none_left(self.options, steps)


def _by_mass(below: Tensor, t: Tensor, options: UniformOptions, generator: torch.Generator) -> StepPlan:
    """Steps in proportion to the mass of their cell; `below` [K + 1] is the distribution function on the grid."""
    steps = candidates(t, options.drop_first, floor=0.0)
    mass = (below[:-1] - below[1:]).clamp_min(torch.finfo(torch.float64).tiny)
    train = draw(steps, mass[steps].log(), options.count, generator)
    return StepPlan.training(train, steps=len(t) - 1, noise=options.noise)
