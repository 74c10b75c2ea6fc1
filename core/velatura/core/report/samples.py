"""The table of an evaluation: which picture of which prompt scored what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from velatura.core.errors import VelaturaError

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

SAMPLES = "samples.parquet"
DESCRIPTION = ("model", "route", "category", "prompt_id", "text", "seed")
METRIC_PREFIXES = ("gold/", "reward/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model on one route; all sequences have one entry per picture, in the order of the stored images."""

    prompt_ids: tuple[str, ...]
    units: tuple[str, ...]
    """What is resampled: prompts that ask for the same thing (same text, same sources) are one unit."""
    seeds: tuple[int, ...]
    categories: tuple[str, ...]
    texts: tuple[str, ...]
    metrics: Mapping[str, Floats]
    """Metric -> values; NaN where it does not apply or failed."""

    def rows_by_prompt(self) -> dict[str, list[int]]:
        """Prompt -> its rows, in the order of the table."""
        found: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.prompt_ids):
            found.setdefault(prompt, []).append(row)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Route -> model -> what was measured; models and metrics in the order of the table."""

    routes: Mapping[str, Mapping[str, Measured]]

    @property
    def models(self) -> list[str]:
        """All models, in the order in which they were evaluated."""
        return list(dict.fromkeys(model for models in self.routes.values() for model in models))

    def metrics(self, route: str) -> list[str]:
        """Metrics that apply to at least one picture of the route."""
        return list(
            dict.fromkeys(
                name
                for measured in self.routes[route].values()
                for name, values in measured.metrics.items()
                if np.isfinite(values).any()
            )
        )

    def categories(self, route: str) -> list[str]:
        """Categories of the route, in the order of the table."""
        return list(dict.fromkeys(name for m in self.routes[route].values() for name in m.categories))


def read_evaluation(folder: Path) -> Evaluation:
    """Read `samples.parquet` of an evaluate stage.

    Raises:
        VelaturaError: it is missing, truncated, or lacks a column.
    """
    path = folder / SAMPLES
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise VelaturaError(f"{path} cannot be read: {error}. Run the evaluation again.") from error
    missing = [name for name in DESCRIPTION if name not in table.column_names]
    if missing:
        raise VelaturaError(f"{path} has no column '{missing[0]}'. Run the evaluation again.")
    described = [name for name in (*DESCRIPTION, "unit") if name in table.column_names]
    text = {name: table.column(name).to_pylist() for name in described}
    numbers = {
        name: np.asarray(table.column(name).to_numpy(), dtype=np.float64)
        for name in table.column_names
        if name.startswith(METRIC_PREFIXES)
    }
    where: dict[str, dict[str, list[int]]] = {}
    for row, (route, model) in enumerate(zip(text["route"], text["model"], strict=True)):
        where.setdefault(route, {}).setdefault(model, []).append(row)
    return Evaluation(
        routes={
            route: {model: _measured(rows, text, numbers) for model, rows in models.items()}
            for route, models in where.items()
        }
    )


def pair(a: Measured, b: Measured) -> tuple[Rows, Rows]:
    """Rows of a and of b that are the same prompt with the same seed."""
    place = {key: row for row, key in enumerate(zip(b.prompt_ids, b.seeds, strict=True))}
    both = [(row, place[key]) for row, key in enumerate(zip(a.prompt_ids, a.seeds, strict=True)) if key in place]
    return np.array([i for i, _ in both], dtype=np.intp), np.array([j for _, j in both], dtype=np.intp)


def _measured(rows: list[int], text: Mapping[str, list[object]], numbers: Mapping[str, Floats]) -> Measured:
    def strings(name: str) -> tuple[str, ...]:
        return tuple(str(text[name][row]) for row in rows)

    return Measured(
        prompt_ids=strings("prompt_id"),
        units=strings("unit" if "unit" in text else "prompt_id"),
        seeds=tuple(int(seed) for seed in strings("seed")),
        categories=strings("category"),
        texts=strings("text"),
        metrics={name: values[rows] for name, values in numbers.items()},
    )
