"""An advantage estimator: from scores to how much better than its group a sample is."""

from __future__ import annotations

import torch
from pydantic import Field

from velatura.api import AdvantageEstimator, Advantages, Options, RewardReport


class MeanMarginOptions(Options):
    """Options of `mean-margin`."""

    clip: float = Field(1.0, gt=0, description="Advantages are divided by their largest where it exceeds this.")


class MeanMargin(AdvantageEstimator[MeanMarginOptions]):
    """The composite reward less its mean over the valid samples of the group."""

    name = "mean-margin"

    def estimate(self, report: RewardReport) -> Advantages:
        """[B]; 0 and not valid where a score is missing. Groups are ids, never texts."""
        composite, valid = report.composite, report.complete
        values = torch.zeros(len(composite))
        for p in range(len(report.prompts)):
            rows = (report.group == p) & valid
            if rows.any():
                margin = composite[rows] - composite[rows].mean()
                values[rows] = margin / (margin.abs().max() / self.options.clip).clamp_min(1)
        return Advantages(values=values, valid=valid)
