"""How far people agree with each other, and a reward with itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from velatura.core.cards.clusters import Draws, Estimate, Floats, Rows, ratio, resampled

Level = Literal["nominal", "ordinal", "interval"]
"""What the distance of two answers is: none but that they differ, how many lie between them, or their square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retest:
    """A reward that scores the same pictures again."""

    icc: float
    """ICC(2,1): share of the variance that belongs to the pictures; NaN where they do not differ at all."""
    sigma: float
    """Standard deviation of the repetitions of one picture, in the reward's own units."""
    pictures: int
    repeats: int


def krippendorff_alpha(answers: ArrayLike, level: Level) -> float:
    """Agreement of raters [raters, units], NaN where one said nothing: 1 - observed / expected disagreement.

    1 is full agreement, 0 what chance gives; NaN where no unit has two answers or all answers are the same
    (Krippendorff, Computing Krippendorff's alpha-reliability, 2011).
    """
    return _alpha(*_counts(np.asarray(answers, dtype=np.float64)), level)


def alpha_over(answers: ArrayLike, level: Level, clusters: Sequence[str], draws: Draws) -> Estimate:
    """Krippendorff's alpha with its percentile interval; `clusters` [units]."""
    values, counts = _counts(np.asarray(answers, dtype=np.float64))
    return resampled(lambda rows: _alpha(values, counts[rows], level), clusters, draws)


def _counts(answers: Floats) -> tuple[Floats, Floats]:
    """The distinct answers [c], and how often each was given to every unit [units, c]."""
    values = np.unique(answers[np.isfinite(answers)])
    return values, (answers[:, :, None] == values).sum(axis=0).astype(np.float64)


def _alpha(values: Floats, counts: Floats, level: Level) -> float:
    said = counts.sum(axis=1)
    shared = counts[said >= 2]
    weighted = shared / (said[said >= 2] - 1)[:, None]
    observed = weighted.T @ shared - np.diag(weighted.sum(axis=0))
    marginal = observed.sum(axis=1)
    total = float(marginal.sum())
    if total < 2:
        return math.nan
    distance = _distance(values, marginal, level)
    expected = float((np.outer(marginal, marginal) * distance).sum())
    if expected == 0:
        return math.nan
    return 1 - (total - 1) * float((observed * distance).sum()) / expected


def _distance(values: Floats, marginal: Floats, level: Level) -> Floats:
    """Squared distance of every two answers [c, c]."""
    if level == "nominal":
        return 1 - np.eye(len(values))
    if level == "interval":
        return np.asarray((values[:, None] - values[None, :]) ** 2)
    upto = np.cumsum(marginal)
    middle = upto - marginal / 2  # half of the own answers and all that lie below
    return np.asarray((middle[:, None] - middle[None, :]) ** 2)


def icc_2_1(scores: ArrayLike) -> float:
    """ICC(2,1) of scores [pictures, repeats]: two-way random effects, absolute agreement, one measurement
    (Shrout and Fleiss 1979). NaN with fewer than two of either, or where nothing differs."""
    table = np.asarray(scores, dtype=np.float64)
    n, k = table.shape
    if n < 2 or k < 2 or not np.ptp(table) > 0:
        return math.nan
    centre, by_row, by_column = table.mean(), table.mean(axis=1), table.mean(axis=0)
    rows = k * ((by_row - centre) ** 2).sum() / (n - 1)
    columns = n * ((by_column - centre) ** 2).sum() / (k - 1)
    rest = table - by_row[:, None] - by_column[None, :] + centre
    error = (rest**2).sum() / ((n - 1) * (k - 1))
    return float((rows - error) / (rows + (k - 1) * error + k * (columns - error) / n))


def retest(scores: ArrayLike) -> Retest:
    """Test-retest of scores [pictures, repeats]; pictures with a missing score are left out."""
    table = np.asarray(scores, dtype=np.float64)
    whole = table[np.isfinite(table).all(axis=1)]
    n, k = whole.shape
    sigma = math.sqrt(float(whole.var(axis=1, ddof=1).mean())) if n and k > 1 else math.nan
    return Retest(icc=icc_2_1(whole), sigma=sigma, pictures=n, repeats=k)


def rater_accuracy(choices: ArrayLike, clusters: Sequence[str], draws: Draws) -> Estimate:
    """How often one rater agrees with the majority of the others: what a reward can hope for.

    `choices` [raters, pairs] is 1 where the first picture was chosen, -1 for the second, 0 for a tie, NaN for nothing.
    A rater's tie counts one half; pairs on which the others are split are left out, as with a reward.
    """
    table = np.asarray(choices, dtype=np.float64)
    others = np.sign(np.nansum(table, axis=0, keepdims=True) - np.nan_to_num(table))
    counted = np.isfinite(table) & (others != 0)
    credit = np.where(np.nan_to_num(table) == 0, 0.5, (np.sign(table) == others).astype(np.float64))
    return ratio((credit * counted).sum(axis=0), counted.sum(axis=0), clusters, draws)


def rater_correlation(ratings: ArrayLike, clusters: Sequence[str], draws: Draws) -> Estimate:
    """Mean over raters of the Spearman correlation of their ratings [raters, pictures] with the mean of the others'."""
    table = np.asarray(ratings, dtype=np.float64)

    def correlation(rows: Rows) -> float:
        part = table[:, rows]
        count = np.isfinite(part).sum(axis=0)
        total = np.nansum(part, axis=0)
        found = []
        for own in part:
            both = np.isfinite(own) & (count >= 2)
            if both.sum() >= 3:
                found.append(spearman(own[both], (total[both] - own[both]) / (count[both] - 1)))
        known = [value for value in found if math.isfinite(value)]
        return float(np.mean(known)) if known else math.nan

    return resampled(correlation, clusters, draws)


def spearman(x: Floats, y: Floats) -> float:
    """Rank correlation; NaN where one of the two does not vary."""
    if len(x) < 2 or not np.ptp(x) > 0 or not np.ptp(y) > 0:
        return math.nan
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
