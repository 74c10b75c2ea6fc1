"""From the table of an evaluation to `summary.json`: means, paired differences, corrected p values, retained gains."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from velatura.core.errors import VelaturaError, suggest
from velatura.core.pictures import write_bytes_atomic
from velatura.core.report.samples import Evaluation, Measured, Rows, pair, read_evaluation
from velatura.core.statistics import estimate, holm, paired, retained

SUMMARY = "summary.json"
MODELS = "models.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How intervals are drawn."""

    bootstrap: int
    seed: int


def summarise(evaluate_folder: Path, baseline: str, *, bootstrap: int, seed: int) -> dict[str, Any]:
    """Compare every model with the baseline; write `summary.json` beside the samples and return what it holds.

    Headline metrics of a route are its gold metrics, or its rewards where there is no gold metric. Their overall
    p values are corrected together (Holm) over metrics and models of the route; per-category numbers are not
    corrected and serve to look, not to claim. The first headline metric is the primary one.

    Raises:
        VelaturaError: the samples cannot be read, or the baseline was not evaluated.
    """
    evaluation = read_evaluation(evaluate_folder)
    if baseline not in evaluation.models:
        raise VelaturaError(f"The baseline '{baseline}' was not evaluated.{suggest(baseline, evaluation.models)}")
    lineage = _lineage(evaluate_folder / MODELS)
    draws = Draws(bootstrap=bootstrap, seed=seed)
    routes = {route: _route(evaluation, route, baseline, lineage, draws) for route in evaluation.routes}
    summary = {
        "baseline": baseline,
        "bootstrap": bootstrap,
        "seed": seed,
        "models": {model: lineage.get(model, {}) for model in evaluation.models},
        "routes": routes,
        "headline": {route: _headline(facts) for route, facts in routes.items() if facts["headline"]},
    }
    content = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes_atomic(evaluate_folder / SUMMARY, content.encode())
    return summary


def _lineage(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    loaded: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return loaded


def _route(
    evaluation: Evaluation, route: str, baseline: str, lineage: Mapping[str, Mapping[str, Any]], draws: Draws
) -> dict[str, Any]:
    models, metrics = evaluation.routes[route], evaluation.metrics(route)
    categories = evaluation.categories(route)
    gold = [name for name in metrics if name.startswith("gold/")]
    headline = gold or metrics
    base = models.get(baseline)
    cells = {
        model: {metric: _cells(own, base, model == baseline, metric, categories, draws) for metric in metrics}
        for model, own in models.items()
    }
    _correct([cells[model][metric]["overall"] for model in cells if model != baseline for metric in headline])
    first = next(iter(models.values()))
    prompts = len(set(first.units))
    return {
        "metrics": metrics,
        "headline": headline,
        "categories": categories,
        "n_prompts": prompts,
        "seeds_per_prompt": round(len(first.prompt_ids) / prompts, 2),
        "models": cells,
        "retained": _retained_gains(models, baseline, route, metrics, lineage, draws),
    }


def _cells(
    own: Measured, base: Measured | None, is_baseline: bool, metric: str, categories: Sequence[str], draws: Draws
) -> dict[str, Any]:
    """Overall and by category."""
    reference = None if is_baseline else base
    return {
        "overall": _cell(own, reference, metric, np.arange(len(own.prompt_ids)), draws),
        "categories": {
            name: _cell(own, reference, metric, np.flatnonzero(np.array(own.categories) == name), draws)
            for name in categories
        },
    }


def _cell(own: Measured, base: Measured | None, metric: str, rows: Rows, draws: Draws) -> dict[str, Any]:
    """Mean with interval, and the difference to the baseline on shared prompts and seeds."""
    prompts = [own.units[row] for row in rows]
    mean = estimate(own.metrics[metric][rows], prompts, bootstrap=draws.bootstrap, seed=draws.seed)
    facts: dict[str, Any] = {
        "mean": mean.value,
        "mean_low": mean.low,
        "mean_high": mean.high,
        "n_prompts": mean.n_prompts,
        "n_samples": mean.n_samples,
        "missing": len(rows) - mean.n_samples,
    }
    if base is not None:
        mine, theirs = pair(own, base)
        chosen = np.isin(mine, rows)
        mine, theirs = mine[chosen], theirs[chosen]
        found = paired(
            own.metrics[metric][mine], base.metrics[metric][theirs], [own.units[row] for row in mine],
            bootstrap=draws.bootstrap, seed=draws.seed,
        )  # fmt: skip
        facts |= {
            "difference": found.difference,
            "low": found.low,
            "high": found.high,
            "p": found.p if found.n_prompts else None,
            "p_holm": None,
            "effect": found.effect,
            "minimum_detectable": found.minimum_detectable,
            "n_pairs": found.n_prompts,
        }
    return {name: _plain(value) for name, value in facts.items()}


def _correct(cells: Sequence[dict[str, Any]]) -> None:
    """Fill in `p_holm` over one family of comparisons."""
    tested = [cell for cell in cells if cell.get("p") is not None]
    for cell, p in zip(tested, holm([cell["p"] for cell in tested]), strict=True):
        cell["p_holm"] = _plain(p)


def _retained_gains(
    models: Mapping[str, Measured], baseline: str, route: str, metrics: Sequence[str],
    lineage: Mapping[str, Mapping[str, Any]], draws: Draws,
) -> dict[str, Any]:  # fmt: skip
    """Model -> its teacher on this route, and the share of the teacher's gain per metric."""
    found = {}
    for model, own in models.items():
        teacher = str((lineage.get(model, {}).get("teachers") or {}).get(route, ""))
        if teacher in models and baseline in models and model != baseline:
            base, taught = models[baseline], models[teacher]
            found[model] = {
                "teacher": teacher,
                "metrics": {name: _share(own, base, taught, name, draws) for name in metrics},
            }
    return found


def _share(own: Measured, base: Measured, taught: Measured, metric: str, draws: Draws) -> dict[str, Any]:
    keys = [dict(zip(zip(m.prompt_ids, m.seeds, strict=True), m.metrics[metric], strict=True)) for m in (base, taught)]
    nan = math.nan
    of_base, of_teacher = (
        [known.get(key, nan) for key in zip(own.prompt_ids, own.seeds, strict=True)] for known in keys
    )
    share = retained(own.metrics[metric], of_base, of_teacher, own.units, bootstrap=draws.bootstrap, seed=draws.seed)
    return {name: _plain(getattr(share, name)) for name in share.__slots__}


def _headline(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The primary metric of a route, short enough for a manifest."""
    metric = facts["headline"][0]
    kept = ("mean", "difference", "low", "high", "p_holm")
    return {
        "metric": metric,
        "models": {
            model: {name: own[metric]["overall"][name] for name in kept if name in own[metric]["overall"]}
            for model, own in facts["models"].items()
        },
        "retained": {
            model: {name: share["metrics"][metric][name] for name in ("ratio", "low", "high", "is_meaningful")}
            for model, share in facts["retained"].items()
        },
    }


def _plain(value: float | bool | int | None) -> float | bool | int | None:
    """JSON has no NaN: what is not a number is null. Floats keep six significant digits."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
