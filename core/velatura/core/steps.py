"""What a plan of steps becomes under a kernel: which steps have a likelihood, and how much each weighs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from velatura.core.errors import VelaturaError
from velatura.core.types import StepPlan, Transition

if TYPE_CHECKING:
    from velatura.core.components import Kernel
    from velatura.core.settings import StepWeightName

OF_THE_NOISE = ("sigma-sqrt-dt", "kl")
"""Step weights that a kernel without noise does not have."""


def with_likelihood(plan: StepPlan, kernel: Kernel[Any], times: Tensor) -> StepPlan:
    """The plan without the trained steps that draw no noise: they have no likelihood, so no ratio.

    Raises:
        VelaturaError: none is left.
    """
    noisy = plan.stochastic.cpu() & (spread(kernel, times) > 0)
    train = plan.train[noisy[plan.train.cpu()]]
    if not len(train):
        raise VelaturaError(
            f"none of the trained steps {plan.train.tolist()} draws noise under kernel '{kernel.name}', so none has a "
            f"likelihood to learn from. Steps that draw: {torch.nonzero(noisy).flatten().tolist() or 'none'}. Let the "
            f"timesteps draw noise where they train (noise: trained), or train on other steps."
        )
    return replace(plan, train=train)


def weighted(plan: StepPlan, name: StepWeightName, kernel: Kernel[Any], times: Tensor) -> StepPlan:
    """The plan with its weights times those called `name`, scaled so that these are 1 on average over trained steps.

    With Delta = t - t_next: `uniform` 1, `t` t, `dt` Delta (an integral over time, on any grid), `dt2` Delta^2,
    `inv-dt` 1 / Delta (GRPO-Guard, arXiv:2510.22319), `sigma-sqrt-dt` the standard deviation of the step
    (TempFlow-GRPO, arXiv:2508.04324), `kl` k^2 / (2 std^2) with k = d mean / d v, the factor between the squared
    distance of two velocities and the KL divergence of their steps.

    Raises:
        VelaturaError: all trained steps weigh 0.
    """
    if name == "uniform":
        return plan
    raw = _raw(name, kernel, times.detach().cpu().double())
    own = raw[plan.train.cpu()]
    if not bool((own > 0).any()):
        raise VelaturaError(
            f"step_weight '{name}' weighs all trained steps {plan.train.tolist()} 0: none of them draws noise under "
            f"kernel '{kernel.name}'. Train on other steps, or take step_weight 'dt'."
        )
    return replace(plan, weight=plan.weight * (raw / own.mean()).to(plan.weight))


def _raw(name: StepWeightName, kernel: Kernel[Any], times: Tensor) -> Tensor:
    """[K] fp64."""
    t, gap = times[:-1], times[:-1] - times[1:]
    if name in OF_THE_NOISE:
        std = spread(kernel, times)
        if name == "sigma-sqrt-dt":
            return std
        gain = _at(kernel, times, v=1.0).mean - _at(kernel, times, v=0.0).mean
        return torch.where(std > 0, (gain / std).square() / 2, torch.zeros_like(std))
    return {"t": t, "dt": gap, "dt2": gap.square(), "inv-dt": 1 / gap}[name]


def spread(kernel: Kernel[Any], times: Tensor) -> Tensor:
    """[K] fp64 standard deviation of each step of the grid [K + 1]."""
    times = times.detach().cpu().double()
    return _at(kernel, times, v=0.0).std.expand(len(times) - 1)


def _at(kernel: Kernel[Any], times: Tensor, v: float) -> Transition:
    """All K steps from x = 0, side by side."""
    zeros = torch.zeros(len(times) - 1, dtype=torch.float64)
    return kernel.step(zeros + v, zeros, times[:-1], times[1:])
