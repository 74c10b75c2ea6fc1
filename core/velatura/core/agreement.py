"""How well marks agree with ratings, and ratings with each other: over prompts, with intervals over prompt clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SAME = 1e-6
"""Values nearer than this are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of n numbers with n others."""

    spearman: float | None
    """Rank correlation over all pictures; None where one side does not vary."""
    spearman_interval: tuple[float, float] | None
    """95 %, clusters resampled."""
    pairwise: float | None
    """Share of pairs of one prompt that are in the same order on both sides, a tie of the first counting half. Pairs
    that the second side does not order are left out; None where none is left."""
    pairwise_interval: tuple[float, float] | None
    pairs: int
    pictures: int
    clusters: int


def agreement(
    marks: Floats, target: Floats, prompts: Sequence[str], clusters: Sequence[str], *, bootstrap: int, seed: int
) -> Agreement:
    """How well `marks` [n] put pictures in the order of `target` [n]; `prompts` and `clusters` [n] are names."""
    names = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    place = np.array([names[cluster] for cluster in clusters], dtype=np.int64)
    wins, counts = _pair_sums(marks, target, prompts, place, len(names))
    draw = np.random.default_rng(seed)
    rows = [np.flatnonzero(place == number) for number in range(len(names))]
    picks = draw.integers(0, len(names), (bootstrap, len(names))) if len(names) > 1 else np.empty((0, 0), np.int64)
    return Agreement(
        spearman=_spearman(marks, target),
        spearman_interval=_interval(
            picks, lambda pick: _spearman(*(side[np.concatenate([rows[i] for i in pick])] for side in (marks, target)))
        ),
        pairwise=float(wins.sum() / counts.sum()) if counts.sum() else None,
        pairwise_interval=_interval(
            picks, lambda pick: float(wins[pick].sum() / counts[pick].sum()) if counts[pick].sum() else None
        ),
        pairs=int(counts.sum()), pictures=len(marks), clusters=len(names),
    )  # fmt: skip


def ceiling(
    ratings: Sequence[Sequence[float]], marks: Floats, prompts: Sequence[str], clusters: Sequence[str]
) -> dict[str, float] | None:
    """Leave one rater out: how well a rater agrees with the mean of the others, and how well `marks` do with the same
    means. Averages over raters, of pairwise agreement and rank correlation; None with fewer than two raters.

    A judge of .9 of the raters' agreement is nearly as good as one of them; above 1 it is better than a single rater.
    """
    raters = min(len(own) for own in ratings)
    if raters < 2:
        return None
    table = np.array([own[:raters] for own in ratings], dtype=np.float64)
    found: dict[str, list[float]] = {}
    for rater in range(raters):
        others = np.delete(table, rater, axis=1).mean(1)
        for who, side in (("rater", table[:, rater]), ("judge", marks)):
            result = agreement(side, others, prompts, clusters, bootstrap=0, seed=0)
            for name in ("spearman", "pairwise"):
                value = getattr(result, name)
                if value is not None:
                    found.setdefault(f"{who}_{name}", []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _spearman(a: Floats, b: Floats) -> float | None:
    if len(a) < 3 or np.ptp(a) < SAME or np.ptp(b) < SAME:
        return None
    from scipy import stats

    return float(stats.spearmanr(a, b).statistic)


def _pair_sums(
    marks: Floats, target: Floats, prompts: Sequence[str], place: NDArray[np.int64], count: int
) -> tuple[Floats, Floats]:
    """Wins and pairs of each cluster; a prompt lies in one cluster."""
    wins, counts = np.zeros(count), np.zeros(count)
    by_prompt: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(row)
    for own in by_prompt.values():
        a, b = np.triu_indices(len(own), 1)
        rows = np.array(own)
        asked = target[rows[a]] - target[rows[b]]
        given = marks[rows[a]] - marks[rows[b]]
        ordered = np.abs(asked) > SAME
        right = np.where(np.abs(given) <= SAME, 0.5, np.sign(given) == np.sign(asked))
        wins[place[own[0]]] += float(right[ordered].sum())
        counts[place[own[0]]] += int(ordered.sum())
    return wins, counts


def _interval(
    picks: NDArray[np.int64], value: Callable[[NDArray[np.int64]], float | None]
) -> tuple[float, float] | None:
    """Percentiles over resamples of clusters; None where more than 1 % of them say nothing."""
    drawn = [found for pick in picks if (found := value(pick)) is not None]
    if not drawn or len(drawn) < 0.99 * len(picks):
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
