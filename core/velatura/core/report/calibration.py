"""What a calibrate stage found: weights, shares, noise, and what the advantage does to every reward and guard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from velatura.core.report.data import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardLine:
    """One reward or guard in one category, as text."""

    name: str
    role: str
    weight: str
    share: str
    budget: str
    noise: str
    reliability: str
    correlation: str
    harms: bool
    """Whether the advantage pushes it down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryWeights:
    """One category."""

    name: str
    groups: str
    is_conflicting: bool
    reason: str
    lines: list[RewardLine]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPage:
    """One calibrate stage, or a training stage that finds its weights anew."""

    stage: Stage
    policy: str
    categories: list[CategoryWeights]
    people: str
    """What came of the fit to human preferences; empty where there was none."""


def read_weights_page(stage: Stage, notes: list[str]) -> CalibrationPage | None:
    """The ledger of weights of a stage, for people."""
    path = stage.folder / "weight_ledger.parquet"
    if not path.exists():
        return None
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        notes.append(f"{stage.name}/{path.name} cannot be read: {error}.")
        return None
    by_category: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        later = f", from step {row['policy_step']} on" if row.get("version") else ""
        by_category.setdefault(f"{row['category']}{later}", []).append(row)
    policy = f"{rows[0]['policy']} at step {rows[0]['policy_step']}" if rows else ""
    return CalibrationPage(
        stage=stage, policy=policy, categories=[_category(name, own) for name, own in by_category.items()],
        people=_people(stage.result.get("human_pairs")),
    )  # fmt: skip


def _category(name: str, rows: list[dict[str, Any]]) -> CategoryWeights:
    first = rows[0]
    return CategoryWeights(
        name=name, groups=f"{first['groups']:g}", is_conflicting=bool(first["is_conflicting"]),
        reason=str(first["reason"]), lines=[_line(row) for row in rows],
    )  # fmt: skip


def _line(row: Mapping[str, Any]) -> RewardLine:
    correlation, trained = row["correlation"], row["role"] == "reward"
    error = row["weight_error"]
    return RewardLine(
        name=str(row["reward"]), role=str(row["role"]),
        weight=(f"{row['weight']:.3f}" + (f" ± {error:.3f}" if error is not None else "")) if trained else "",
        share=f"{row['share']:.0%}" if trained else "", budget=f"{row['budget']:.0%}" if trained else "",
        noise=_number(row["noise"], ".3g"), reliability=_number(row["reliability"], ".2f"),
        correlation=_number(correlation, "+.2f"), harms=correlation is not None and correlation < 0,
    )  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _people(fit: Any) -> str:
    """A sentence on the fit to human preferences."""
    if not isinstance(fit, Mapping):
        return ""
    counted = f"{fit['pairs']} pairs of {fit['prompts']} prompts"
    if fit["accuracy"] is None:
        return f"Budgets were not fitted to people ({counted}): {fit['refused']}."
    words = (
        f"On prompts left out, the fit to {counted} agrees with people {fit['accuracy']:.1%} of the time, equal "
        f"weights "
        f"{fit['equal']:.1%}, the best single reward {fit['single']:.1%}"
    )
    if fit["refused"]:
        return f"{words}: no certain gain, so budgets are as written."
    return f"{words}; gain {fit['gain']:+.3f} [{fit['low']:+.3f}, {fit['high']:+.3f}] over prompts."
