"""Intervals and tests for scores that come in clusters: several pictures (seeds) of one prompt are not independent.

The prompt is the unit throughout. Seeds are averaged within a prompt first, prompts are resampled, signs are flipped
per prompt. Treating every picture as independent gives intervals that are too narrow: with 4 seeds and an intraclass
correlation of 0.5 a nominal 95 % interval covers the truth about 80 % of the time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DETECTABLE = 2.80
"""z for 95 % two-sided plus z for 80 % power: 1.96 + 0.84."""
EXACT_PROMPTS = 13
"""Up to so many non-zero differences all sign patterns (2^13 = 8192) are visited; beyond, `FLIPS` are drawn."""
FLIPS = 9_999
"""Random sign patterns. The smallest p value they can show is 1 / (FLIPS + 1) = 0.0001."""
UNDEFINED = 0.01
"""Share of resamples without a positive denominator up to which a ratio still has an interval."""
BLOCK = 4_000_000
"""Elements of the largest temporary array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A measured number with its 95 % interval over prompts."""

    value: float
    low: float
    """Lower end; NaN when there are fewer than two prompts."""
    high: float
    """Upper end."""
    n_prompts: int
    """Independent units."""
    n_samples: int
    """Pictures behind them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedResult:
    """Two models on the same prompts and seeds: a minus b."""

    mean_a: float
    """Mean over prompts of the mean over seeds."""
    mean_b: float
    difference: float
    """mean_a - mean_b."""
    low: float
    """Lower end of the 95 % interval of the difference; NaN when there are fewer than two prompts."""
    high: float
    """Upper end."""
    p: float
    """Two-sided sign-flip permutation test of the per-prompt differences."""
    effect: float
    """Mean over standard deviation of the per-prompt differences; NaN where they do not vary."""
    minimum_detectable: float
    """The difference that this many prompts would show with 80 % power: 2.80 sd / sqrt(n)."""
    n_prompts: int
    """Prompts with at least one pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """What share of a teacher's gain over the base a student has: (student - base) / (teacher - base)."""

    ratio: float
    """1 is all of it; NaN where the teacher gained exactly nothing."""
    low: float
    """Lower end of the 95 % interval; NaN where it is not defined."""
    high: float
    """Upper end."""
    student_gain: float
    teacher_gain: float
    is_meaningful: bool
    """The teacher's gain has an interval above 0. A share of a gain that may be nothing says nothing."""
    n_prompts: int


def estimate(values: ArrayLike, prompts: Sequence[str], *, bootstrap: int, seed: int) -> Interval:
    """Mean of one metric with its prompt-level interval; samples without a value (NaN, None) are left out."""
    known, ids = _known([_floats(values)], prompts)
    (means,) = _by_prompt(known, ids)
    low, high = mean_interval(means, bootstrap=bootstrap, seed=seed)
    value = float(means.mean()) if len(means) else math.nan
    return Interval(value=value, low=low, high=high, n_prompts=len(means), n_samples=len(ids))


def paired(
    values_a: ArrayLike, values_b: ArrayLike, prompts: Sequence[str], *, bootstrap: int, seed: int
) -> PairedResult:
    """Compare two models sample by sample: row i of both is the same prompt with the same seed.

    A sample that lacks a value on either side is left out of both, so the means compare like with like. A prompt
    without any pair drops out.
    """
    known, ids = _known([_floats(values_a), _floats(values_b)], prompts)
    a, b = _by_prompt(known, ids)
    d = a - b
    n = len(d)
    if not n:
        nan = math.nan
        return PairedResult(mean_a=nan, mean_b=nan, difference=nan, low=nan, high=nan, p=1.0, effect=nan,
                            minimum_detectable=nan, n_prompts=0)  # fmt: skip
    low, high = mean_interval(d, bootstrap=bootstrap, seed=seed)
    sd = float(d.std(ddof=1)) if n > 1 else math.nan
    varies = n > 1 and _varies(d)
    return PairedResult(
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=float(d.mean()),
        low=low,
        high=high,
        p=sign_flip(d, seed=seed),
        effect=float(d.mean()) / sd if varies else math.nan,
        minimum_detectable=DETECTABLE * sd / math.sqrt(n),
        n_prompts=n,
    )


def retained(
    student: ArrayLike, base: ArrayLike, teacher: ArrayLike, prompts: Sequence[str], *, bootstrap: int, seed: int
) -> Retained:
    """The student's share of the teacher's gain, prompts resampled for all three together.

    The interval is the percentile one. A ratio has no interval where its denominator may be 0: when the teacher's own
    interval reaches 0, or more than 1 % of the resamples give the teacher no gain, `is_meaningful` is false and the
    ends are NaN. The fewer such resamples that remain are set aside.
    """
    known, ids = _known([_floats(student), _floats(base), _floats(teacher)], prompts)
    s, b, t = _by_prompt(known, ids)
    gain, taught = s - b, t - b
    low_taught, _ = mean_interval(taught, bootstrap=bootstrap, seed=seed)
    student_gain = float(gain.mean()) if len(gain) else math.nan
    teacher_gain = float(taught.mean()) if len(gain) else math.nan
    low, high = math.nan, math.nan
    if low_taught > 0:
        low, high = _ratio_interval(gain, taught, bootstrap=bootstrap, seed=seed)
    return Retained(
        ratio=student_gain / teacher_gain if teacher_gain else math.nan,
        low=low,
        high=high,
        student_gain=student_gain,
        teacher_gain=teacher_gain,
        is_meaningful=math.isfinite(low),
        n_prompts=len(gain),
    )


def mean_interval(x: ArrayLike, *, bootstrap: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of independent numbers: BCa bootstrap (Efron 1987).

    Numbers that are all equal give an interval of width 0; fewer than two give NaN. Where BCa is not defined (its
    acceleration or bias correction is not finite), the percentile interval stands in.
    """
    values = _floats(x)
    if len(values) < 2:
        return math.nan, math.nan
    if not _varies(values):
        return float(values.mean()), float(values.mean())
    low, high = _bootstrap(values, "BCa", bootstrap, seed)
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = _bootstrap(values, "percentile", bootstrap, seed)
    return low, high


def sign_flip(differences: ArrayLike, *, seed: int) -> float:
    """Two-sided p value: how often random signs give a mean at least as far from 0 as the one observed.

    Exact for few prompts; otherwise (1 + hits) / (1 + flips), which is never 0 (Phipson and Smyth 2010).
    Differences of exactly 0 look the same under either sign, so they change nothing and are set aside.
    """
    values = _floats(differences)
    d = values[values != 0]
    if not len(d):
        return 1.0
    limit = abs(float(d.sum())) - 1e-9 * float(np.abs(d).sum())  # ties count as hits whatever the summation order
    if len(d) <= EXACT_PROMPTS:
        patterns = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        return float((np.abs((2 * patterns - 1) @ d) >= limit).mean())
    rng = np.random.default_rng(seed)
    hits, rest, block = 0, FLIPS, max(1, BLOCK // len(d))
    while rest:
        rows = min(rest, block)
        signs = 2.0 * rng.integers(0, 2, size=(rows, len(d)), dtype=np.int8) - 1.0
        hits += int((np.abs(signs @ d) >= limit).sum())
        rest -= rows
    return (1 + hits) / (1 + FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for the number of comparisons (Holm 1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _floats(values: ArrayLike) -> Floats:
    """float64 [n]; None becomes NaN."""
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _varies(values: Floats) -> bool:
    return bool(np.ptp(values) > 1e-12 * max(1.0, float(np.abs(values).max())))


def _known(columns: Sequence[Floats], prompts: Sequence[str]) -> tuple[list[Floats], list[str]]:
    """The samples that have a value in every column, with their prompts."""
    if any(len(column) != len(prompts) for column in columns):
        sizes = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"one prompt per value is needed: {sizes} values and {len(prompts)} prompts")
    keep = np.ones(len(prompts), dtype=bool)
    for column in columns:
        keep &= np.isfinite(column)
    return [column[keep] for column in columns], [
        prompt for prompt, kept in zip(prompts, keep.tolist(), strict=True) if kept
    ]


def _by_prompt(columns: Sequence[Floats], prompts: Sequence[str]) -> list[Floats]:
    """Mean of each column within each prompt; prompts in the order in which they first appear."""
    number: dict[str, int] = {}
    row = np.array([number.setdefault(prompt, len(number)) for prompt in prompts], dtype=np.intp)
    count = np.bincount(row, minlength=len(number))
    return [np.bincount(row, weights=column, minlength=len(number)) / count for column in columns]


def _bootstrap(values: Floats, method: str, resamples: int, seed: int) -> tuple[float, float]:
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate BCa is answered by the caller, not by a warning
        interval = stats.bootstrap(
            (values,), np.mean, n_resamples=resamples, batch=max(1, BLOCK // len(values)), vectorized=True,
            method=method, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def _ratio_interval(gain: Floats, taught: Floats, *, bootstrap: int, seed: int) -> tuple[float, float]:
    """Percentile interval of mean(gain) / mean(taught); NaN where too many resamples have no positive denominator."""
    rng, n = np.random.default_rng(seed), len(gain)
    ratios, block = [], max(1, BLOCK // n)
    for first in range(0, bootstrap, block):
        rows = rng.integers(0, n, size=(min(block, bootstrap - first), n))
        above, below = gain[rows].mean(axis=1), taught[rows].mean(axis=1)
        usable = below > 0
        ratios.append(above[usable] / below[usable])
    found = np.concatenate(ratios)
    if len(found) < (1 - UNDEFINED) * bootstrap:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
