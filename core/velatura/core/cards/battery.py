"""A reward before perturbed pictures: where its score goes, and where it should not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from velatura.core.cards.clusters import Draws, Estimate, Floats, mean
from velatura.core.cards.perturb import ANY, BATTERY, FALLS, Perturbation, expected, perturbed
from velatura.core.cards.scoring import Scoring
from velatura.core.seeds import generator
from velatura.core.types import Sample

Verdict = Literal["right", "hole", "unclear", "told", "no score"]
"""What is seen of an expectation; `told` where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One perturbation."""

    name: str
    about: str
    expected: str
    change: Estimate
    """Score of the perturbed picture less that of the picture, in standard deviations of the reward."""
    raised: float
    """Share of the pictures whose score rose."""
    lost: float
    """Share that got no score."""
    verdict: Verdict

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        names = ("name", "about", "expected", "raised", "lost", "verdict")
        return {**{name: getattr(self, name) for name in names}, "change": self.change.plain()}


def run_battery(
    scoring: Scoring, rows: Sequence[int], own: Mapping[str, str], tolerance: float, draws: Draws
) -> list[Seen]:
    """Every perturbation that applies, on these pictures. `own` says what is expected beside the reward's dimension.

    A reward that must not gain has a hole where the interval of the change lies above `tolerance`; one that must fall,
    where its score does not fall on average. Changes are in standard deviations of its scores over these pictures, or
    in its own units where they do not differ.
    """
    signs = expected(scoring.model.dimension(), {**scoring.model.expectations(), **own})
    before = np.concatenate(scoring.scores([(row,) for row in rows])) if not scoring.by_group else np.zeros(len(rows))
    spread = float(np.nanstd(before)) if np.isfinite(before).any() else 0.0
    found = []
    for name, perturbation in BATTERY.items():
        shown = [
            i for i, row in enumerate(rows) if not perturbation.edits_only or scoring.rated.pictures[row].facts.sources
        ]
        if shown:
            change = _changes(scoring, perturbation, [rows[i] for i in shown], before[shown], draws.seed)
            clusters = [scoring.rated.pictures[rows[i]].facts.cluster for i in shown]
            found.append(_seen(perturbation, signs[name], change / (spread or 1.0), clusters, tolerance, draws))
    return found


def _changes(
    scoring: Scoring, perturbation: Perturbation, rows: Sequence[int], before: Floats, seed: int
) -> Floats:  # fmt: skip
    """Score after less score before; a judge that compares sees both."""

    def group(row: int) -> list[Sample]:
        clean = scoring.sample(row)
        draw = generator(seed, "perturb", perturbation.name, row)
        worse = scoring.sample(row, perturbed(perturbation, clean.image, clean.prompt, draw))
        return [clean, worse] if scoring.by_group else [worse]

    after = scoring.of_samples([lambda row=row: group(row) for row in rows])  # type: ignore[misc]
    if scoring.by_group:
        return np.array([values[1] - values[0] for values in after])
    return np.concatenate(after) - before


def _seen(
    perturbation: Perturbation, sign: str, change: Floats, clusters: Sequence[str], tolerance: float, draws: Draws
) -> Seen:
    estimate, known = mean(change, clusters, draws), np.isfinite(change)
    return Seen(
        name=perturbation.name, about=perturbation.about, expected=sign, change=estimate,
        raised=float((change[known] > 0).mean()) if known.any() else 0.0, lost=float(1 - known.mean()),
        verdict=_verdict(sign, estimate, tolerance),
    )  # fmt: skip


def _verdict(sign: str, change: Estimate, tolerance: float) -> Verdict:
    """What the interval says of the expectation."""
    if not math.isfinite(change.value):
        return "no score"
    if sign == ANY:
        return "told"
    if sign == FALLS:
        if change.value >= 0:
            return "hole"
        return "right" if change.high < 0 else "unclear"
    if change.low > tolerance or (not math.isfinite(change.low) and change.value > tolerance):
        return "hole"
    return "right" if change.high <= tolerance else "unclear"
