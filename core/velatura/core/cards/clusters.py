"""Numbers with intervals over clusters: what shares a prompt, a source or a person is drawn together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

UNDEFINED = 0.01
"""Share of resamples without a value up to which a statistic still has an interval."""
BLOCK = 4_000_000
"""Elements of the largest temporary array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How intervals are drawn."""

    bootstrap: int
    """Resamples of the clusters."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A measured number with its 95 % interval over clusters."""

    value: float
    """NaN where there is nothing to measure it on."""
    low: float
    """NaN where there is no interval."""
    high: float
    method: str
    """Of the interval: `BCa`, `percentile` (where BCa is undefined or too slow), `constant` (every cluster says the
    same, so the interval has no width), or `none` (fewer than two clusters)."""
    clusters: int
    """Independent units."""
    n: int
    """Observations in them."""

    def plain(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        numbers = {name: rounded(getattr(self, name)) for name in ("value", "low", "high")}
        return {**numbers, "method": self.method, "clusters": self.clusters, "n": self.n}


def rounded(value: float) -> float | None:
    """Six significant digits; None for what is no finite number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def ratio(above: ArrayLike, below: ArrayLike, clusters: Sequence[str], draws: Draws) -> Estimate:
    """sum(above) / sum(below) [n], and its interval: clusters are resampled with all that is in them (BCa; Efron 1987).

    With `below` = 1 this is a mean. Observations whose `above` or `below` is NaN are left out.
    """
    top, bottom, row, count = _summed(above, below, clusters)
    total = float(bottom.sum())
    value = float(top.sum()) / total if total > 0 else math.nan
    if total <= 0 or count < 2:
        return Estimate(value=value, low=math.nan, high=math.nan, method="none", clusters=count, n=len(row))
    if np.allclose(top * total, bottom * top.sum(), rtol=1e-12, atol=1e-12 * abs(total)):
        return Estimate(value=value, low=value, high=value, method="constant", clusters=count, n=len(row))
    for method in ("BCa", "percentile"):
        low, high = _interval(top, bottom, method, draws)
        if math.isfinite(low) and math.isfinite(high):
            return Estimate(value=value, low=low, high=high, method=method, clusters=count, n=len(row))
    return Estimate(value=value, low=math.nan, high=math.nan, method="none", clusters=count, n=len(row))


def mean(values: ArrayLike, clusters: Sequence[str], draws: Draws) -> Estimate:
    """Mean [n] and its interval over clusters."""
    known = np.asarray(values, dtype=np.float64)
    return ratio(known, np.ones(len(known)), clusters, draws)


def resampled(statistic: Callable[[Rows], float], clusters: Sequence[str], draws: Draws) -> Estimate:
    """Any statistic of the rows it is given, and its percentile interval over clusters.

    For what is no ratio of sums, such as a rank correlation, for which the jackknife that BCa needs is too slow.
    """
    number: dict[str, int] = {}
    owner = np.array([number.setdefault(name, len(number)) for name in clusters], dtype=np.intp)
    count, everything = len(number), np.arange(len(owner), dtype=np.intp)
    value = statistic(everything) if len(owner) else math.nan
    if count < 2 or not math.isfinite(value):
        return Estimate(value=value, low=math.nan, high=math.nan, method="none", clusters=count, n=len(owner))
    rows = [everything[owner == i] for i in range(count)]
    rng = np.random.default_rng(draws.seed)
    found = np.array([
        statistic(np.concatenate([rows[i] for i in rng.integers(0, count, size=count)])) for _ in range(draws.bootstrap)
    ])  # fmt: skip
    usable = found[np.isfinite(found)]
    if len(usable) < (1 - UNDEFINED) * draws.bootstrap:
        return Estimate(value=value, low=math.nan, high=math.nan, method="none", clusters=count, n=len(owner))
    low, high = np.quantile(usable, [0.025, 0.975])
    return Estimate(
        value=value, low=float(low), high=float(high), method="percentile", clusters=count, n=len(owner)
    )  # fmt: skip


def _summed(above: ArrayLike, below: ArrayLike, clusters: Sequence[str]) -> tuple[Floats, Floats, Rows, int]:
    """Sums over each cluster that has something below, and the rows that count."""
    top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    if not len(top) == len(bottom) == len(clusters):
        raise ValueError(f"one cluster per value is needed: {len(top)} and {len(bottom)} values, {len(clusters)}")
    keep: Rows = np.flatnonzero(np.isfinite(top) & np.isfinite(bottom))
    number: dict[str, int] = {}
    owner = np.array([number.setdefault(clusters[i], len(number)) for i in keep.tolist()], dtype=np.intp)
    tops: Floats = np.bincount(owner, weights=top[keep], minlength=len(number)).astype(np.float64)
    bottoms: Floats = np.bincount(owner, weights=bottom[keep], minlength=len(number)).astype(np.float64)
    filled = bottoms > 0
    return tops[filled], bottoms[filled], keep, int(filled.sum())


def _interval(top: Floats, bottom: Floats, method: str, draws: Draws) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate BCa is answered by the caller, not by a warning
        found = stats.bootstrap(
            (top, bottom), _quotient, paired=True, vectorized=True, method=method, n_resamples=draws.bootstrap,
            batch=max(1, BLOCK // len(top)), rng=np.random.default_rng(draws.seed),
        ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _quotient(top: Floats, bottom: Floats, axis: int = -1) -> Floats:
    return np.asarray(top.sum(axis=axis) / bottom.sum(axis=axis))
