"""Which prompts are worth learning from."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from velatura.api import Admission, Options, PromptFilter, RewardReport


class RangeOptions(Options):
    """Options of `range`. With both thresholds the larger one decides."""

    threshold: float | None = Field(None, ge=0, description="Least range, in the units of the composite reward.")
    quantile: float | None = Field(
        0.3, ge=0, lt=1, description="Share of the prompts of each category to drop, those of the lowest range."
    )
    min_valid: float = Field(
        0.75, gt=0, le=1, description="A prompt is judged where this share of its samples, and two, are fully scored."
    )

    @model_validator(mode="after")
    def _needs_a_threshold(self) -> Self:
        if self.threshold is None and self.quantile is None:
            raise ValueError(
                "the range filter needs a threshold, a quantile, or both; with neither it keeps everything"
            )
        return self


class Range(PromptFilter[RangeOptions]):
    """Keep prompts whose samples differ in reward (Qwen-Image-2.0-RL, arXiv:2606.27608).

    D_p = max_i R_pi - min_i R_pi, R the composite reward before any normalisation, over the samples of prompt p that
    are fully scored. Keep where D_p >= tau_c and D_p > 0, tau_c = max(threshold, the D below which lie
    floor(quantile n_c) of the n_c prompts of category c). Prompts with too few scores are dropped and do not count in
    n_c. The source compares with a constant it does not give; a quantile adapts to the reward's scale. Ranges of
    groups of different size are not comparable.
    """

    name = "range"

    def admit(self, report: RewardReport) -> Admission:
        """[P] decisions; the statistic is D_p."""
        composite = report.composite.double()
        rows = [composite[report.group == p] for p in range(len(report.prompts))]
        ranges = [self._range(values) for values in rows]
        thresholds = self._thresholds([prompt.category for prompt in report.prompts], ranges)
        keep, reasons = [], []
        for prompt, values, spread in zip(report.prompts, rows, ranges, strict=True):
            kept, reason = _decide(spread, thresholds.get(prompt.category, 0.0), values)
            keep.append(kept)
            reasons.append(reason)
        return Admission(keep=torch.tensor(keep), reason=tuple(reasons), statistic=torch.tensor(ranges).float())

    def _range(self, composite: Tensor) -> float:
        """D of one prompt's composites; NaN with too few of them."""
        scored = composite[~composite.isnan()]
        if len(scored) < max(2, self.options.min_valid * len(composite)):
            return math.nan
        return float(scored.max() - scored.min())

    def _thresholds(self, categories: list[str], ranges: list[float]) -> dict[str, float]:
        """tau of each category that has a prompt with a range."""
        known: defaultdict[str, list[float]] = defaultdict(list)
        for category, spread in zip(categories, ranges, strict=True):
            if not math.isnan(spread):
                known[category].append(spread)
        floor = self.options.threshold or 0.0
        if self.options.quantile is None:
            return dict.fromkeys(known, floor)
        share = self.options.quantile
        # The small term undoes binary rounding of the share: 0.29 * 100 is 28.999...
        return {c: max(floor, sorted(values)[int(share * len(values) + 1e-9)]) for c, values in known.items()}


def _decide(spread: float, threshold: float, composite: Tensor) -> tuple[bool, str]:
    """Whether to keep a prompt, and the phrase for the ledger."""
    if math.isnan(spread):
        return False, f"too few valid scores ({int((~composite.isnan()).sum())} of {len(composite)})"
    if spread == 0:
        return False, "range 0: every sample scores the same"
    if spread < threshold:
        return False, f"range {spread:.4g} < {threshold:.4g}"
    return True, f"kept: range {spread:.4g}"
