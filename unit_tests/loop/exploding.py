"""A plugin file for the tests: objectives that break at a chosen step, in the ways in which real ones do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Options, Points, PolicyObjective, Requirements, Role, hookimpl


class BreaksOptions(Options):
    """When, and what."""

    at: int = Field(1, description="First call of `loss` that breaks.")
    until: int = Field(10**9, description="First call after these that does not.")
    what: str = Field("loss", description="loss or gradient.")


class Breaks(PolicyObjective[BreaksOptions]):
    """A squared error; for a while the loss of points late in time, or the gradient alone, is not finite."""

    name = "breaks"
    requires = Requirements(roles=frozenset({Role.CURRENT, Role.REFERENCE}), advantage=True, contrast=False)
    calls = 0

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """Which points break is decided by their times."""
        v = velocity[Role.CURRENT]
        each = (v - points.target).square().flatten(1).mean(1) * points.weight
        cls = type(self)
        cls.calls += 1
        if self.options.at <= cls.calls < self.options.until:
            if self.options.what == "loss":
                each = torch.where(points.t < 0.6, each / 0.0, each)
            else:
                zero = (v * 0).sum()
                each = each + torch.sqrt(zero) * 0  # finite, and its derivative is 0 * inf
        return Loss(value=each.sum(), metrics={"level": each.detach().mean()})


@hookimpl
def velatura_objective():
    """What this file offers."""
    return [Breaks]
