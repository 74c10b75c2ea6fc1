"""Which prompts are worth learning from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from velatura.api import Admission, Options, PromptFilter, RewardReport
from velatura.core.spread import noise_range
from velatura.rewards.noise import Noise, composites, noise_of
from velatura.rewards.prompt_states import Spread, StateOptions, state_of, with_known_names

NotNegative = Annotated[float, Field(ge=0)]
NEAR = 0.5
"""Interquartile ranges on either side of the threshold within which a decision is borderline."""


class RangeOptions(Options):
    """Options of `range`. Of several thresholds the largest decides."""

    threshold: float | None = Field(None, ge=0, description="Least range, in the units of the composite reward.")
    quantile: float | None = Field(
        0.3, ge=0, lt=1, description="Share of the prompts of each category to drop, those of the lowest range."
    )
    min_valid: float = Field(
        0.75, gt=0, le=1, description="A prompt is judged where this share of its samples, and two, are fully scored."
    )
    noise: dict[str, NotNegative] = Field(
        default_factory=dict,
        description="Reward -> its test-retest standard deviation; of others it is measured where the stage `repeats`.",
    )
    noise_quantile: float = Field(
        0.95, gt=0, lt=1, description="Share of groups that noise alone, where it is known, does not get past."
    )
    bounds: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="Reward -> its lowest and highest score. With those of all weighted rewards, prompts that are "
        "solved or too hard are told apart.",
    )
    held_out: list[str] = Field(
        default_factory=list, description="Rewards of weight 0 that a hacked reward would disagree with."
    )
    disagreement: float = Field(
        0.5, ge=0, lt=1, description="Least negative correlation within a group at which a held-out reward disagrees."
    )

    @model_validator(mode="after")
    def _needs_a_threshold(self) -> Self:
        if self.threshold is None and self.quantile is None and not self.noise:
            raise ValueError(
                "the range filter needs a threshold, a quantile, or both, or the rewards' noise; with none of them it "
                "keeps everything"
            )
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        for name, (low, high) in self.bounds.items():
            if not low < high:
                raise ValueError(f"bounds of {name!r} are {low:g} and {high:g}: the lowest score comes first")
        return self


class Range(PromptFilter[RangeOptions]):
    """Keep prompts whose samples differ in reward (Qwen-Image-2.0-RL, arXiv:2606.27608).

    D_p = max_i R_pi - min_i R_pi, R the composite reward before any normalisation, over the samples of prompt p that
    are fully scored. Keep where D_p >= tau_p and D_p > 0, tau_p = max(threshold, the D below which lie
    floor(quantile n_c) of the n_c prompts of category c, q sigma_p): sigma_p the noise of the composite and q the
    quantile of the studentized range of as many draws, so that of prompts with nothing but noise a share
    1 - noise_quantile gets through. Prompts with too few scores are dropped and do not count in n_c. The source
    compares with a constant it does not give; a quantile adapts to the reward's scale. Ranges of groups of different
    size are not comparable.

    A prompt above tau is dropped all the same where 90 % of its samples lie at an end of the scale, where more than
    half of its variance is the judge's own, or where more than 80 % of its range is one reward's and a held-out reward
    disagrees with it.
    """

    name = "range"

    def admit(self, report: RewardReport) -> Admission:
        """[P] decisions; the statistic is D_p."""
        options = self.options
        with_known_names(report, "bounds", options.bounds)
        with_known_names(report, "held_out", options.held_out)
        noise = noise_of(report, options.noise)
        composite = report.composite.double()
        passes = None if report.repeats is None else composites(report)
        rows = [torch.nonzero(report.group == p).flatten() for p in range(len(report.prompts))]
        ranges = [self._range(composite[own]) for own in rows]
        categories = [prompt.category for prompt in report.prompts]
        thresholds = self._thresholds(categories, ranges)
        spreads = [
            Spread(rows=own, composite=composite[own], range=d, threshold=thresholds.get(c, 0.0),
                   noise=self._noise_floor(report, own, composite[own], noise),
                   passes=None if passes is None else passes[:, own])
            for own, d, c in zip(rows, ranges, categories, strict=True)
        ]  # fmt: skip
        states = StateOptions(bounds=options.bounds, held_out=options.held_out, disagreement=options.disagreement)
        decided = [state_of(spread, report, states) for spread in spreads]
        tau = [max(spread.threshold, spread.noise) if not math.isnan(spread.range) else math.nan for spread in spreads]
        return Admission(
            keep=torch.tensor([state == "active" for state, _ in decided]),
            reason=tuple(reason for _, reason in decided),
            statistic=torch.tensor(ranges).float(),
            state=tuple(state for state, _ in decided),
            threshold=torch.tensor(tau).float(),
            borderline=_near(categories, ranges, tau, [state for state, _ in decided]),
        )

    def _range(self, composite: Tensor) -> float:
        """D of one prompt's composites; NaN with too few of them."""
        scored = composite[~composite.isnan()]
        if len(scored) < max(2, self.options.min_valid * len(composite)):
            return math.nan
        return float(scored.max() - scored.min())

    def _noise_floor(self, report: RewardReport, rows: Tensor, composite: Tensor, noise: Noise) -> float:
        """The range that noise alone stays below; 0 where no noise is known."""
        sigma = noise.of_prompt(report, rows) if noise.sigma else 0.0
        count = int((~composite.isnan()).sum())
        return noise_range(count, self.options.noise_quantile) * sigma if sigma and count > 1 else 0.0

    def _thresholds(self, categories: list[str], ranges: list[float]) -> dict[str, float]:
        """tau of each category that has a prompt with a range, before noise."""
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


def _near(categories: Sequence[str], ranges: Sequence[float], tau: Sequence[float], states: Sequence[str]) -> Tensor:
    """[P] whether D lies within half an interquartile range of tau, of prompts that are active or flat."""
    spread: dict[str, float] = {}
    for category in set(categories):
        own = [d for c, d in zip(categories, ranges, strict=True) if c == category and not math.isnan(d)]
        low, high = torch.tensor(own or [0.0]).double().quantile(torch.tensor([0.25, 0.75]).double()).tolist()
        spread[category] = high - low
    return torch.tensor([
        state in ("active", "flat") and d > 0 and abs(d - t) < NEAR * spread[c]
        for c, d, t, state in zip(categories, ranges, tau, states, strict=True)
    ])  # fmt: skip
