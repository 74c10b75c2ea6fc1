"""The ledger of reward weights: what a calibrate stage writes, and what other stages read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from velatura.core.calibrated import Calibration
from velatura.core.calibration import Statistics
from velatura.core.checkpoint import write_json_atomic
from velatura.core.components import AdvantageEstimator
from velatura.core.errors import CheckpointError, RecipeError, prefixed
from velatura.core.judge import WeightedReward
from velatura.core.types import Prompt
from velatura.core.weighing import Weighed

RESULT, LEDGER = "calibration.json", "weight_ledger.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Of which policy a calibration speaks."""

    model: str
    step: int
    """Steps that made it; 0 for the base."""
    version: int = 0
    """Of the weights; those of a calibrate stage are the first."""


def write_calibration(
    folder: Path, names: Sequence[str], rewards: int, found: Statistics, weighed: Sequence[Weighed], origin: Origin
) -> None:
    """`calibration.json` for the stages that use it, `weight_ledger.parquet` for people."""
    roles = ["reward"] * rewards + ["guard"] * (len(names) - rewards)
    write_ledger(folder, [row for own in weighed for row in ledger_rows(names, roles, found, own, origin)])
    write_json_atomic(folder / RESULT, {
        "names": list(names), "rewards": rewards, "model": origin.model, "step": origin.step,
        "categories": {own.category: {
            "weights": _named(names[:rewards], own.weights),
            "noise": _named(names, found.noise[own.category]),
            "spread": _named(names, found.spread[own.category]),
            "sigma": own.sigma.tolist(),
            "budget": _named(names[:rewards], own.budget),
        } for own in weighed},
    })  # fmt: skip


def write_ledger(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """`weight_ledger.parquet`, whole or as it was."""
    temporary = (folder / LEDGER).with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
    temporary.replace(folder / LEDGER)


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """Its rows; none where there is no ledger."""
    path = folder / LEDGER
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist() if path.exists() else []
    return rows


def ledger_rows(
    names: Sequence[str], roles: Sequence[str], found: Statistics, own: Weighed, origin: Origin
) -> list[dict[str, Any]]:
    """One row for each reward and guard that has something to say in the category."""
    columns: dict[str, np.ndarray[Any, Any]] = {
        "weight": own.weights, "budget": own.budget, "share": own.share, "weight_of_budget": own.start,
        "weight_error": own.error, "correlation": own.correlation, "noise": found.noise[own.category],
        "spread": found.spread[own.category], "reliability": found.reliability[own.category],
    }  # fmt: skip
    return [
        {
            "category": own.category, "reward": name, "role": roles[k],
            **{column: _finite(values[k]) for column, values in columns.items()},
            "groups": own.groups, "is_conflicting": own.is_conflicting, "sigma_hash": own.sigma_hash,
            "policy": origin.model, "policy_step": origin.step, "version": origin.version, "reason": own.reason,
        }
        for k, name in enumerate(names)
        if not math.isnan(found.spread[own.category][k])
    ]  # fmt: skip


def _named(names: Sequence[str], values: Any) -> dict[str, float]:
    """By name, without those that are not known."""
    return {name: float(value) for name, value in zip(names, values, strict=False) if math.isfinite(value)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def read_calibration(run_folder: Path, stage: str) -> Calibration:
    """What a finished calibrate stage left.

    Raises:
        CheckpointError: it has not finished, or its file is not what it wrote.
    """
    path = run_folder / stage / RESULT
    if not path.exists():
        raise CheckpointError(f"stage '{stage}' has no finished calibration at {path}. Run it first.")
    try:
        data = json.loads(path.read_text())
        by_category: Mapping[str, Any] = data["categories"]
        return Calibration(
            names=tuple(data["names"]),
            weights={c: own["weights"] for c, own in by_category.items()},
            noise={c: own["noise"] for c, own in by_category.items()},
            spread={c: own["spread"] for c, own in by_category.items()},
            sigma={c: torch.tensor(own["sigma"], dtype=torch.float64) for c, own in by_category.items()},
            budgets={c: own.get("budget", {}) for c, own in by_category.items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not what the stage left ({type(error).__name__}: {error}). Do it again: velatura run RECIPE "
            f"--stage {stage} --fresh"
        ) from error


def calibrated_weights(calibration: Calibration, label: str, *, raw: bool) -> dict[str, float]:
    """Category -> weight of a reward; with `raw` for scores as they are, so divided by their spread within groups."""
    found = {}
    for category, weights in calibration.weights.items():
        spread = calibration.spread[category].get(label, 0.0)
        weight = weights.get(label, 0.0)
        found[category] = (weight / spread if spread > 0 else 0.0) if raw else weight
    return found


def require_calibrated(calibration: Calibration, prompts: Sequence[Prompt], stage: str, at: str) -> None:
    """Every category of the prompts has weights.

    Raises:
        RecipeError: one has not.
    """
    categories = {category for i in range(len(prompts)) for category in prompts[i].membership}
    missing = sorted(categories - set(calibration.weights))
    if missing:
        raise RecipeError(
            f"{at}: '{stage}' calibrated {', '.join(sorted(calibration.weights))}, but there are prompts of category "
            f"{', '.join(map(repr, missing))}. Let it draw prompts of every category, best from the same task."
        )


def require_prepared(
    advantage: AdvantageEstimator[Any], rewards: Sequence[WeightedReward], prompts: Sequence[Prompt], at: str
) -> None:
    """The advantage knows what it has to of every category that a reward has a weight in.

    Raises:
        RecipeError: it does not.
    """
    if type(advantage).unprepared is AdvantageEstimator.unprepared:
        return  # no prompt has to be looked at
    weights: dict[str, dict[str, float]] = {}
    for i in range(len(prompts)):
        for category in prompts[i].membership:
            own = weights.setdefault(category, {})
            for reward in rewards:
                own[reward.label] = max(own.get(reward.label, 0.0), reward.weight_for(prompts[i]))
    if complaint := advantage.unprepared(weights):
        raise RecipeError(prefixed(at, complaint))
