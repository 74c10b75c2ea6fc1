"""Prompts that a policy neither always nor never gets right."""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from velatura.api import Admission, Options, PromptFilter, RewardReport
from velatura.core.types import group_rows

State = tuple[str, str, float]
"""Name of the state, the phrase for the ledger, and the statistic."""


class ZeroVarianceOptions(Options):
    """Options of `zero-variance`."""

    tolerance: float = Field(
        0.0, ge=0, description="Standard deviations of the composite reward up to this count as 0; rounding is 1e-6."
    )


class DifficultyBandOptions(Options):
    """Options of `difficulty-band`."""

    low: float = Field(0.1, description="Least statistic that is kept.")
    high: float = Field(0.9, description="Largest statistic that is kept.")
    pass_at: float | None = Field(
        None,
        description="The statistic is the share of samples with a composite reward of at least this; null: the mean of "
        "the composite itself, in its own units.",
    )
    min_valid: float = Field(
        0.75, gt=0, le=1, description="A prompt is judged where this share of its samples, and two, are fully scored."
    )

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}: the band would hold nothing")
        if self.pass_at is not None and (self.low > 1 or self.high < 0):
            raise ValueError(
                f"with pass_at the band is one of shares, which are in [0, 1], but it goes from {self.low:g} to "
                f"{self.high:g}: nothing would be kept"
            )
        return self


class ZeroVariance(PromptFilter[ZeroVarianceOptions]):
    """Drop prompts whose samples all score the same: their advantages are 0, or noise divided by nothing.

    Keep where s_p > tolerance, s_p^2 = sum_i (R_pi - mean R_p)^2 / (n - 1) over the n fully scored samples of prompt p,
    R the composite reward (DAPO, arXiv:2503.14476, drops groups that all pass or all fail; Flow-GRPO's code,
    arXiv:2505.05470, drops advantages of exactly 0). Made for use during training; where pictures are worth their
    price, `range` tells more.
    """

    name = "zero-variance"

    def admit(self, report: RewardReport) -> Admission:
        """[P] decisions; the statistic is the standard deviation."""
        return _admission([self._state(values) for values in _composites(report)], self.options.tolerance)

    def _state(self, values: Tensor) -> State:
        scored = values[~values.isnan()]
        if len(scored) < 2:
            return _too_few(values)
        spread = float(scored.std()) if bool((scored != scored[0]).any()) else 0.0
        if spread <= self.options.tolerance:
            return "flat", f"standard deviation {spread:.4g}: every sample scores the same", spread
        return "active", f"kept: standard deviation {spread:.4g}", spread


class DifficultyBand(PromptFilter[DifficultyBandOptions]):
    """Keep prompts of medium difficulty: low <= statistic <= high.

    The statistic is the mean composite reward of a prompt's samples, or with `pass_at` the share that reaches it. For
    a reward of 0 and 1 with pass rate p a group's variance is p (1 - p): most is learned at 1/2, and nothing at the
    ends. That medium prompts carry most signal is AdaGRPO's observation (arXiv:2606.06828); the limits are ours.
    Prompts above the band are `solved`, below it `too_hard`: both sleep and may come back as the policy changes.
    """

    name = "difficulty-band"

    def admit(self, report: RewardReport) -> Admission:
        """[P] decisions; the statistic is the mean or the pass rate."""
        return _admission([self._state(values) for values in _composites(report)])

    def _state(self, values: Tensor) -> State:
        options = self.options
        scored = values[~values.isnan()]
        if len(scored) < max(2, options.min_valid * len(values)):
            return _too_few(values)
        passed = scored if options.pass_at is None else (scored >= options.pass_at).double()
        found, name = float(passed.mean()), "mean reward" if options.pass_at is None else "pass rate"
        if found > options.high:
            return "solved", f"solved: {name} {found:.4g} > {options.high:g}", found
        if found < options.low:
            return "too_hard", f"too hard: {name} {found:.4g} < {options.low:g}", found
        return "active", f"kept: {name} {found:.4g}", found


def _composites(report: RewardReport) -> list[Tensor]:
    """[P][G] fp64, NaN where a sample is not fully scored."""
    composite = report.composite.double()
    return [composite[rows] for rows in group_rows(report.group, len(report.prompts))]


def _too_few(values: Tensor) -> State:
    return "failed", f"too few valid scores ({int((~values.isnan()).sum())} of {len(values)})", math.nan


def _admission(states: list[State], threshold: float | None = None) -> Admission:
    statistic = torch.tensor([found for _, _, found in states]).float()
    return Admission(
        keep=torch.tensor([state == "active" for state, _, _ in states], dtype=torch.bool),
        reason=tuple(reason for _, reason, _ in states),
        statistic=statistic,
        state=tuple(state for state, _, _ in states),
        threshold=None if threshold is None else torch.where(statistic.isnan(), torch.nan, threshold).float(),
    )
