"""A reward beside people: pairs, orders, the best of a group, probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from velatura.core.cards.agreement import spearman
from velatura.core.cards.clusters import Draws, Estimate, Floats, Rows, mean, ratio, resampled

BINS = 10
"""Of the reliability diagram, over confidences from 1/2 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """N pairs of pictures of one prompt each, and what reward and people say of them."""

    delta: Floats
    """[N] score of the first less that of the second; NaN where one is missing."""
    share: Floats
    """[N] share of the raters who chose the first, ties counted one half."""
    human: Floats
    """[N] what most raters chose: 1 the first, -1 the second, 0 neither."""
    clusters: tuple[str, ...]
    """[N]."""

    def only(self, rows: Rows | np.ndarray[Any, np.dtype[np.bool_]]) -> Pairs:
        """Some of them."""
        index = np.arange(len(self.delta))[rows]
        names = tuple(self.clusters[i] for i in index)
        return Pairs(delta=self.delta[index], share=self.share[index], human=self.human[index], clusters=names)

    @property
    def scored(self) -> Pairs:
        """Those with both scores."""
        return self.only(np.isfinite(self.delta))

    @property
    def decided(self) -> Pairs:
        """Those with both scores on which people prefer one."""
        return self.only(np.isfinite(self.delta) & (self.human != 0))


def accuracies(pairs: Pairs, draws: Draws) -> dict[str, Estimate]:
    """Pairwise accuracy: `strict` counts a tie of the reward as wrong, `half` as one half; `ties` is their share."""
    known = pairs.decided
    right, tie = np.sign(known.delta) == known.human, known.delta == 0
    return {
        "half": mean(right + 0.5 * tie, known.clusters, draws),
        "strict": mean(right, known.clusters, draws),
        "ties": mean(tie, known.clusters, draws),
    }


def three_way(pairs: Pairs, eps: float, draws: Draws) -> Estimate:
    """Share of pairs, ties of people among them, on which the reward says the same: a tie where |delta| <= eps."""
    known = pairs.scored
    said = np.where(np.abs(known.delta) <= eps, 0.0, np.sign(known.delta))
    return mean(said == known.human, known.clusters, draws)


def fit_eps(pairs: Pairs) -> float:
    """The tie threshold with the most agreement; the smallest of equals. NaN without pairs."""
    known = pairs.scored
    if not len(known.delta):
        return math.nan
    size = np.abs(known.delta)
    order = np.argsort(size, kind="stable")
    tied = np.concatenate([[0.0], np.cumsum(known.human[order] == 0)])
    right = (np.sign(known.delta) == known.human)[order] & (size[order] > 0)
    apart = np.concatenate([np.cumsum(right[::-1])[::-1], [0.0]])
    levels = np.concatenate([[0.0], size[order]])
    # at a threshold all pairs of that size are tied: the last of equal sizes stands for them
    last = np.searchsorted(size[order], levels, side="right")
    agreement = tied[last] + apart[last]
    return float(levels[int(np.argmax(agreement))])


def fit_temperature(pairs: Pairs) -> float:
    """T of P(first better) = sigmoid(delta / T) with the least log-loss against the raters' shares; NaN without
    pairs that differ."""
    known = pairs.scored
    scale = float(np.abs(known.delta).mean()) if len(known.delta) else 0.0
    if scale == 0:
        return math.nan

    def loss(log_ratio: float) -> float:
        logit = known.delta / (scale * math.exp(log_ratio))
        return float(-(known.share * special.log_expit(logit) + (1 - known.share) * special.log_expit(-logit)).mean())

    found = optimize.minimize_scalar(loss, bounds=(-7, 7), method="bounded", options={"xatol": 1e-4})
    return scale * math.exp(float(found.x))


def calibration(pairs: Pairs, temperature: float, draws: Draws) -> dict[str, Any]:
    """Brier score, expected calibration error and reliability diagram of sigmoid(delta / T), T from other pairs.

    The diagram is folded: confidence max(p, 1 - p) in [1/2, 1] against the share of raters who agree, so that it does
    not depend on which picture comes first. ECE = sum over bins of n_b / N |confidence - agreement|; with few pairs it
    is above 0 for the best of judges.
    """
    known = pairs.scored
    if not math.isfinite(temperature) or not len(known.delta):
        return {}
    p = special.expit(known.delta / temperature)
    confidence = np.maximum(p, 1 - p)
    agreement = np.where(p >= 0.5, known.share, 1 - known.share)

    def error(rows: Rows) -> float:
        return sum(abs(b["confidence"] - b["agreement"]) * b["n"] for b in _bins(confidence[rows], agreement[rows])) / (
            len(rows)
        )

    return {
        "brier": mean((p - known.share) ** 2, known.clusters, draws),
        "ece": resampled(error, known.clusters, draws),
        "bins": _bins(confidence, agreement),
    }


def _bins(confidence: Floats, agreement: Floats) -> list[dict[str, float]]:
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    found = []
    for number in np.unique(place):
        inside = place == number
        found.append({
            "confidence": float(confidence[inside].mean()), "agreement": float(agreement[inside].mean()),
            "n": int(inside.sum()),
        })  # fmt: skip
    return found


def correlations(reward: Floats, human: Floats, clusters: Sequence[str], draws: Draws) -> dict[str, Estimate]:
    """Spearman, Kendall's tau-b and Pearson of scores [N] and mean ratings [N] over all pictures."""
    return {
        name: resampled(lambda rows, f=function: f(reward[rows], human[rows]), clusters, draws)  # type: ignore[misc]
        for name, function in CORRELATIONS.items()
    }


def within(
    reward: Floats, human: Floats, prompts: Sequence[str], clusters: Sequence[str], draws: Draws
) -> dict[str, Estimate]:
    """The same within each prompt, averaged over the prompts on which both vary: what a group of samples is ordered
    by."""
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    rows = [np.array(members) for members in groups.values()]
    owners = [clusters[members[0]] for members in groups.values()]
    return {
        name: mean([function(reward[own], human[own]) for own in rows], owners, draws)
        for name, function in CORRELATIONS.items()
    }


def selection(groups: Sequence[tuple[Floats, Floats]], clusters: Sequence[str], draws: Draws) -> Estimate:
    """What choosing the best of a group by the reward is worth to people, as a share of what the best choice is.

    sum_g (human of the chosen - mean of g) / sum_g (best human - mean of g), for groups of (scores, human) [G]. Among
    equal scores the choice is a coin's; pictures without a score cannot be chosen.
    """
    gains, best = [], []
    for reward, human in groups:
        known = np.isfinite(reward)
        gains.append(_chosen(reward[known], human[known]) - human.mean() if known.any() else math.nan)
        best.append(human.max() - human.mean())
    return ratio(np.array(gains), np.array(best), clusters, draws)


def _chosen(reward: Floats, human: Floats) -> float:
    return float(human[reward == reward.max()].mean())


def affine(reward: Floats, human: Floats) -> dict[str, float]:
    """Human rating = intercept + slope * score, by least squares."""
    if len(reward) < 3 or not np.ptp(reward) > 0:
        return {}
    line = stats.linregress(reward, human)
    return {"slope": float(line.slope), "intercept": float(line.intercept)}


def kendall(x: Floats, y: Floats) -> float:
    """Tau-b; NaN where one of the two does not vary."""
    if len(x) < 2 or not np.ptp(x) > 0 or not np.ptp(y) > 0:
        return math.nan
    return float(stats.kendalltau(x, y).statistic)


def pearson(x: Floats, y: Floats) -> float:
    """Correlation; NaN where one of the two does not vary."""
    if len(x) < 2 or not np.ptp(x) > 0 or not np.ptp(y) > 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


CORRELATIONS: Mapping[str, Callable[[Floats, Floats], float]] = {
    "spearman": spearman,
    "kendall": kendall,
    "pearson": pearson,
}
