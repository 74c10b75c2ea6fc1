"""What a prompt's scores say of it: worth training on, asleep, or to be kept away until somebody looked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from velatura.api import RewardReport, Status, VelaturaError
from velatura.core.errors import suggest
from velatura.rewards.noise import weight_shares

SATURATED = 0.9
"""Share of the samples at one end of the scale from which a prompt is solved, or too hard."""
END = 0.05
"""How much of the scale belongs to an end."""
OWN = 0.5
"""Share of a group's variance that is the judge's own, above which its range is disagreement and not quality."""
ALONE = 0.8
"""Share of a range that comes from one reward, above which that reward alone decides."""
State = tuple[str, str]
"""Name of the state, and the phrase for the ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How far apart the samples of a prompt are, and how far they should be."""

    rows: Tensor
    """Rows of its G samples in the report."""
    composite: Tensor
    """[G], NaN where not fully scored."""
    range: float
    """Largest less smallest; NaN with too few scores."""
    threshold: float
    """Least range, from what is set or from the category."""
    noise: float
    """The range that noise alone stays below; 0 where it is not known."""
    passes: Tensor | None = None
    """[K + 1, G] composites of repeated passes, if there were any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOptions:
    """What is known besides the scores."""

    bounds: Mapping[str, tuple[float, float]]
    held_out: Sequence[str]
    disagreement: float


def with_known_names(report: RewardReport, option: str, names: Iterable[str]) -> None:
    """Refuse an option that names a reward which the stage does not have."""
    for name in names:
        if name not in report.names:
            raise VelaturaError(f"`{option}` names {name!r}, which is no reward here.{suggest(name, report.names)}")


def state_of(spread: Spread, report: RewardReport, options: StateOptions) -> State:
    """The state of one prompt; the first that fits of: failed, solved, too_hard, flat, noisy, hackable, active."""
    if math.isnan(spread.range):
        valid = int((~spread.composite.isnan()).sum())
        return "failed", f"too few valid scores ({valid} of {len(spread.composite)})"
    return (
        _saturated(spread, report, options)
        or _flat(spread)
        or _noisy(spread)
        or _hackable(spread, report, options)
        or ("active", f"kept: range {spread.range:.4g}")
    )


def _flat(spread: Spread) -> State | None:
    """Nothing to learn: no sample is better than another."""
    if spread.range == 0:
        return "flat", "range 0: every sample scores the same"
    if spread.range < spread.threshold:
        return "flat", f"range {spread.range:.4g} < {spread.threshold:.4g}"
    if spread.range < spread.noise:
        return "flat", f"range {spread.range:.4g} < {spread.noise:.4g}, which noise alone reaches"
    return None


def _saturated(spread: Spread, report: RewardReport, options: StateOptions) -> State | None:
    """Almost all samples at one end of the composite's scale, where that is known."""
    share = weight_shares(report, spread.rows)
    weighted = [(name, part) for name, part in zip(report.names, share, strict=True) if part > 0]
    if not weighted or any(name not in options.bounds for name, _ in weighted):
        return None
    low, high = (sum(part * options.bounds[name][end] for name, part in weighted) for end in (0, 1))
    values = spread.composite[~spread.composite.isnan()]
    room = END * (high - low)
    at_top, at_bottom = int((values >= high - room).sum()), int((values <= low + room).sum())
    if at_top >= SATURATED * len(values):
        return "solved", f"solved: {at_top} of {len(values)} samples at the top"
    if at_bottom >= SATURATED * len(values):
        return (
            "too_hard",
            f"too hard: {at_bottom} of {len(values)} samples at the bottom; is the reward right?",
        )
    return None


def _noisy(spread: Spread) -> State | None:
    """Repeated passes over the same pictures differ almost as much as the pictures do."""
    if spread.passes is None:
        return None
    again = spread.passes.var(dim=0)
    known = again[~again.isnan()]
    values = spread.composite[~spread.composite.isnan()]
    if not len(known):
        return None
    share = float(known.mean() / values.var())
    return ("noisy", f"noisy: {min(share, 1):.0%} of the variance is the judge's own") if share > OWN else None


def _hackable(spread: Spread, report: RewardReport, options: StateOptions) -> State | None:
    """One reward makes the range, and one that is not trained on goes the other way."""
    if not options.held_out:
        return None
    share = weight_shares(report, spread.rows)
    filled = spread.composite.nan_to_num(nan=-math.inf)
    best, worst = int(filled.argmax()), int(spread.composite.nan_to_num(nan=math.inf).argmin())
    known = report.status[spread.rows] == int(Status.OK)
    values = torch.where(known, report.scores[spread.rows], torch.nan).double()
    parts = [part * float(values[best, r] - values[worst, r]) if part > 0 else 0.0 for r, part in enumerate(share)]
    largest = max(range(len(parts)), key=lambda r: parts[r])
    if not parts[largest] > ALONE * spread.range:
        return None
    for name in options.held_out:
        r = _correlation(spread.composite, values[:, report.names.index(name)])
        if r < -options.disagreement:
            return "hackable", (
                f"hackable: {parts[largest] / spread.range:.0%} of the range is '{report.names[largest]}', and "
                f"held-out '{name}' goes the other way (r {r:.2f})"
            )
    return None


def _correlation(one: Tensor, other: Tensor) -> float:
    """Of the samples that have both; 0 where there is none to speak of."""
    both = ~(one.isnan() | other.isnan())
    if int(both.sum()) < 3 or float(one[both].std()) == 0 or float(other[both].std()) == 0:
        return 0.0
    return float(torch.corrcoef(torch.stack([one[both], other[both]]))[0, 1])
