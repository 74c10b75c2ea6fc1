"""What a card measures: a reward beside the ratings of a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from velatura.core.cards.agreement import Retest, alpha_over, rater_accuracy, rater_correlation, retest
from velatura.core.cards.battery import run_battery
from velatura.core.cards.clusters import Draws, Estimate, Floats, mean, rounded
from velatura.core.cards.comparing import (
    Pairs,
    accuracies,
    affine,
    calibration,
    correlations,
    fit_eps,
    fit_temperature,
    selection,
    three_way,
    within,
)
from velatura.core.cards.perturb import preserving
from velatura.core.cards.ratings import WITHIN, RatedPair, RatedPicture
from velatura.core.cards.scoring import Group, Scoring
from velatura.core.components import ComparesPairs
from velatura.core.errors import cause
from velatura.core.types import Status

FEW_VALUES = 12
"""Metadata with at most so many values makes slices by itself."""
AGAIN = 200
"""Pictures, or pairs, that are scored again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a card is made."""

    draws: Draws
    repeats: int = 2
    """How often pictures are scored once more; 0 for never."""
    battery: int = 64
    """Pictures that are perturbed; 0 for none."""
    tolerance: float = 0.1
    """Gain, in standard deviations of the reward, below which a perturbation does not pay."""
    slices: tuple[str, ...] = ()
    """Metadata to slice by, beside those with few values."""
    expect: Mapping[str, str] = field(default_factory=dict)
    """Perturbation -> expectation, in place of the reward's."""


@dataclass(frozen=True)
class Measuring:
    """A reward, its ratings, and what follows from them."""

    scoring: Scoring
    options: Options

    def everything(self) -> dict[str, Any]:
        """All measures as plain data."""
        eps, temperature = fit_eps(self._pairs("calibration")), fit_temperature(self._pairs("calibration"))
        draws = self.options.draws
        test = self._pairs("test")
        strata = {name: self._stratum(name) for name in self.strata}
        return {
            "pairs": strata,
            "ties": {"eps": rounded(eps), "accuracy": three_way(test, eps, draws).plain()} if eps == eps else {},
            "calibration": _plain({**calibration(test, temperature, draws), "temperature": temperature}),
            "ratings": self._ratings(),
            "selection": self._selection().plain(),
            "people": self._people(),
            "slices": list(self._slices()),
            "retest": self._retest(),
            "position": self._position(),
            "cost": self._cost(),  # before the battery: pictures that nobody draws may fail
            "battery": self._battery(),
        }

    @cached_property
    def deltas(self) -> Floats:
        """Score of the first less that of the second picture of every pair."""
        groups = [(pair.first, pair.second) for pair in self.scoring.rated.pairs]
        return np.array([values[0] - values[1] for values in self.scoring.scores(groups)])

    @cached_property
    def strata(self) -> list[str]:
        """Those of the pairs, the primary one first."""
        known = dict.fromkeys(pair.stratum for pair in self.scoring.rated.pairs)
        return sorted(known, key=lambda name: (name != WITHIN, name))

    def _rows(self, split: str, stratum: str | None = None) -> list[int]:
        rated = self.scoring.rated
        return [
            row for row, pair in enumerate(rated.pairs)
            if rated.split_of(pair.first) == split and stratum in (None, pair.stratum)
        ]  # fmt: skip

    def _pairs(self, split: str, stratum: str | None = None, rows: Sequence[int] | None = None) -> Pairs:
        chosen = self._rows(split, stratum) if rows is None else list(rows)
        pairs = [self.scoring.rated.pairs[row] for row in chosen]
        shares = [np.mean(list(pair.choices.values())) for pair in pairs]
        return Pairs(
            delta=self.deltas[chosen] if chosen else np.zeros(0),
            share=(np.array(shares, dtype=np.float64) + 1) / 2,
            human=np.sign(np.array([sum(pair.choices.values()) for pair in pairs], dtype=np.float64)),
            clusters=tuple(self._cluster(pair) for pair in pairs),
        )

    def _cluster(self, pair: RatedPair) -> str:
        return self.scoring.rated.pictures[pair.first].facts.cluster

    def _stratum(self, name: str) -> dict[str, Any]:
        """Accuracy on the test pairs of a stratum, and what one rater reaches there."""
        rows, draws = self._rows("test", name), self.options.draws
        pairs = [self.scoring.rated.pairs[row] for row in rows]
        table = answers([pair.choices for pair in pairs], self.scoring.rated.raters)
        ceiling = rater_accuracy(table, [self._cluster(pair) for pair in pairs], draws)
        found = accuracies(self._pairs("test", rows=rows), draws)
        return _plain({**found, "ceiling": ceiling, "pairs": len(rows)})

    def _rated(self) -> list[int]:
        """Test pictures with ratings."""
        pictures = self.scoring.rated.pictures
        return [i for i, p in enumerate(pictures) if p.ratings and self.scoring.rated.split_of(i) == "test"]

    def _ratings(self) -> dict[str, Any]:
        """Scores beside ratings; of a judge that compares, within prompts alone."""
        groups = self._groups(self._rated())
        rows = [row for group in groups for row in group]
        if not rows:
            return {}
        pictures = [self.scoring.rated.pictures[row] for row in rows]
        reward, human = np.concatenate(self.scoring.scores(groups)), np.array([p.mean for p in pictures])
        known = np.isfinite(reward)
        kept = [p for p, ok in zip(pictures, known, strict=True) if ok]
        clusters, prompts = [p.facts.cluster for p in kept], [p.facts.key for p in kept]
        draws = self.options.draws
        made: dict[str, Any] = {"within": within(reward[known], human[known], prompts, clusters, draws)}
        if not self.scoring.by_group:
            made["overall"] = correlations(reward[known], human[known], clusters, draws)
            made["affine"] = affine(reward[known], human[known])
        return _plain(made)

    def _groups(self, rows: Sequence[int]) -> list[Group]:
        """Rows of one prompt together."""
        found: dict[str, list[int]] = {}
        for row in rows:
            found.setdefault(self.scoring.rated.pictures[row].facts.key, []).append(row)
        return [tuple(group) for group in found.values()]

    def _selection(self) -> Estimate:
        """The best of the rated pictures of a prompt, or of a pair where nothing is rated."""
        rated, pictures = self.scoring.rated, self.scoring.rated.pictures
        groups = [group for group in self._groups(self._rated()) if len(group) > 1]
        human = [np.array([pictures[row].mean for row in group]) for group in groups]
        if not groups:
            pairs = [rated.pairs[row] for row in self._rows("test")]
            groups = [(pair.first, pair.second) for pair in pairs]
            human = [np.array([(m + 1) / 2, (1 - m) / 2]) for m in (np.mean(list(p.choices.values())) for p in pairs)]
        clusters = [pictures[group[0]].facts.cluster for group in groups]
        return selection(list(zip(self.scoring.scores(groups), human, strict=True)), clusters, self.options.draws)

    def _people(self) -> dict[str, Any]:
        """How far people agree with each other: of choices nominal, of ratings ordinal."""
        rated, draws = self.scoring.rated, self.options.draws
        pairs = [rated.pairs[row] for row in self._rows("test")]
        pictures = [rated.pictures[row] for row in self._rated()]
        made: dict[str, Any] = {"raters": len(rated.raters)}
        if pairs:
            table = answers([pair.choices for pair in pairs], rated.raters)
            made["choices"] = alpha_over(table, "nominal", [self._cluster(pair) for pair in pairs], draws)
        if pictures:
            table, clusters = answers([p.ratings for p in pictures], rated.raters), [p.facts.cluster for p in pictures]
            made["ratings"] = alpha_over(table, "ordinal", clusters, draws)
            made["correlation"] = rater_correlation(table, clusters, draws)
        return _plain(made)

    def _slices(self) -> Iterator[dict[str, Any]]:
        """Accuracy on test pairs by category, model and metadata; of pairs of one policy where there are any."""
        stratum = WITHIN if WITHIN in self.strata else None
        rows, rated = self._rows("test", stratum), self.scoring.rated
        first = [rated.pictures[rated.pairs[row].first] for row in rows]
        for by in self._slicings(first):
            values = [_value(picture, by) for picture in first]
            for value in sorted({known for known in values if known is not None}):
                chosen = [row for row, own in zip(rows, values, strict=True) if own == value]
                found = accuracies(self._pairs("test", rows=chosen), self.options.draws)
                yield {"by": by, "value": value, "half": found["half"].plain(), "ties": found["ties"].plain()}

    def _slicings(self, pictures: Sequence[RatedPicture]) -> list[str]:
        keys = dict.fromkeys(key for picture in pictures for key in picture.facts.metadata)
        few = [key for key in keys if 1 < len({_value(picture, key) for picture in pictures} - {None}) <= FEW_VALUES]
        models = ["model"] if len({picture.model for picture in pictures}) > 1 else []
        return list(dict.fromkeys(["category", *models, *self.options.slices, *few]))

    def _retest(self) -> dict[str, Any]:
        """Pictures scored again; of a deterministic reward, under changes that keep their content, too."""
        groups = self._again()
        if not self.options.repeats or not groups:
            return {}
        first = np.concatenate(self.scoring.scores(groups))
        again = [np.concatenate(self.scoring.fresh(groups)) for _ in range(self.options.repeats)]
        same = retest(np.stack([first, *again], axis=1))
        if self.scoring.by_group or same.sigma != 0:
            return _retested(same, "the same pictures again")
        kept = retest(np.stack([first, *self._preserved([row for group in groups for row in group])], axis=1))
        return _retested(kept, "changes that keep the content, as it is deterministic")

    def _again(self) -> list[Group]:
        """What is scored again."""
        rated = self.scoring.rated
        if self.scoring.by_group:
            pairs = [rated.pairs[row] for row in self._rows("test")]
            found: list[Group] = [(pair.first, pair.second) for pair in pairs[:AGAIN]]
            return found
        return spread([(row,) for row in range(len(rated.pictures)) if rated.split_of(row) == "test"], AGAIN)

    def _preserved(self, rows: Sequence[int]) -> list[Floats]:
        """Scores [pictures] under each change that keeps the content."""
        ways = len(preserving(self.scoring.sample(rows[0]).image))

        def changed(row: int, way: int) -> list[Any]:
            return [self.scoring.sample(row, preserving(self.scoring.sample(row).image)[way])]

        return [
            np.concatenate(self.scoring.of_samples([lambda r=row, w=way: changed(r, w) for row in rows]))  # type: ignore[misc]
            for way in range(ways)
        ]

    def _position(self) -> dict[str, Any]:
        """Whether a judge of pairs says the same in both orders."""
        model = self.scoring.model
        if not isinstance(model, ComparesPairs):
            return {}
        pairs = [self.scoring.rated.pairs[row] for row in self._rows("test")][:AGAIN]
        orders: list[Floats] = []
        for turned in (False, True):
            shown = [(pair.second, pair.first) if turned else (pair.first, pair.second) for pair in pairs]
            try:
                said = model.prefer([(self.scoring.sample(a), self.scoring.sample(b)) for a, b in shown])
            except Exception as error:  # of a plugin
                nothing = {"value": None, "low": None, "high": None}
                return {"consistency": nothing, "bias": nothing, "reason": cause(error)}
            valid = np.array([status is Status.OK for status in said.status])
            orders.append(np.where(valid, said.values.double().numpy(), np.nan))
        one, other = orders
        both = np.isfinite(one) & np.isfinite(other)
        agree = np.where(both, np.sign(one - 0.5) == -np.sign(other - 0.5), np.nan)
        clusters = [self._cluster(pair) for pair in pairs]
        draws = self.options.draws
        return _plain({"consistency": mean(agree, clusters, draws), "bias": mean(one + other - 1, clusters, draws)})

    def _battery(self) -> list[dict[str, Any]]:
        """Perturbed pictures of the test split."""
        rated = self.scoring.rated
        rows = spread(
            [row for row in range(len(rated.pictures)) if rated.split_of(row) == "test"], self.options.battery
        )
        if not rows:
            return []
        given = self.options
        return [seen.plain() for seen in run_battery(self.scoring, rows, given.expect, given.tolerance, given.draws)]

    def _cost(self) -> dict[str, Any]:
        """Failures, time and tokens of all that was asked."""
        scoring, usage = self.scoring, self.scoring.usage
        shown = max(1, scoring.pictures)
        return {
            "pictures": scoring.pictures,
            "failed": rounded(scoring.failed),
            "statuses": {status.name.lower(): count for status, count in sorted(scoring.status.items())},
            "reasons": [f"{reason} ({count})" for reason, count in scoring.reasons.most_common(3)],
            "p50": rounded(float(np.quantile(scoring.seconds, 0.5))) if scoring.seconds else None,
            "p95": rounded(float(np.quantile(scoring.seconds, 0.95))) if scoring.seconds else None,
            "batch": scoring.batch,
            "pictures_per_second": rounded(scoring.pictures / max(1e-9, sum(scoring.seconds))),
            "prompt_tokens": None if usage is None else rounded(usage.prompt / shown),
            "completion_tokens": None if usage is None else rounded(usage.completion / shown),
        }


def answers(said: Sequence[Mapping[str, float]], raters: Sequence[str]) -> Floats:
    """[raters, units], NaN where somebody said nothing."""
    return np.array([[unit.get(rater, math.nan) for unit in said] for rater in raters]).reshape(len(raters), len(said))


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly from all."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _value(picture: RatedPicture, by: str) -> str | None:
    """What a picture has of a slicing; None for what is no plain value."""
    if by == "category":
        return picture.facts.category
    known = picture.model if by == "model" else picture.facts.metadata.get(by)
    return str(known) if isinstance(known, str | int | float | bool) else None


def _retested(found: Retest, kind: str) -> dict[str, Any]:
    numbers = {"icc": rounded(found.icc), "sigma": rounded(found.sigma)}
    return {**numbers, "pictures": found.pictures, "repeats": found.repeats, "kind": kind}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates and numbers as JSON has them."""
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(values: Any) -> Any:
    if isinstance(values, Estimate):
        return values.plain()
    if isinstance(values, Mapping):
        return _plain(values)
    if isinstance(values, list):
        return [_as_json(value) for value in values]
    return rounded(values) if isinstance(values, float) else values
