"""A prompt filter: which prompts are worth learning from."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Admission, Options, PromptFilter, RewardReport


class StdOptions(Options):
    """Options of `std`."""

    least: float = Field(0.01, ge=0, description="Prompts whose pictures vary less than this in reward are dropped.")


class Std(PromptFilter[StdOptions]):
    """Keep prompts whose pictures differ: where all are equally good there is nothing to learn."""

    name = "std"

    def admit(self, report: RewardReport) -> Admission:
        """[P] decisions, a reason for each; the statistic is the std of the composite reward, NaN with too few."""
        composite = report.composite
        spread = [self._spread(composite[report.group == p]) for p in range(len(report.prompts))]
        statistic = torch.tensor(spread)
        keep = statistic > self.options.least
        reasons = ["failed" if math.isnan(s) else "varies" if k else "flat" for s, k in zip(spread, keep, strict=True)]
        return Admission(keep=keep, reason=tuple(reasons), statistic=statistic)

    def _spread(self, values: Tensor) -> float:
        """NaN where fewer than two pictures have a score."""
        known = values[~values.isnan()]
        return float(known.std()) if len(known) > 1 else math.nan
