"""The ledger of prompts: what was measured of each, what was decided, and why; one row a prompt, in a parquet file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from velatura.core.errors import CheckpointError
from velatura.core.types import Admission, RewardReport, group_rows

ASLEEP = ("flat", "solved", "too_hard")
"""States from which a prompt may wake; out of the others it is let by a person."""
Row = dict[str, Any]


def rows_of(report: RewardReport, admission: Admission, model: str) -> list[Row]:
    """One row a prompt of a screening; `model` drew the samples."""
    groups = group_rows(report.group, len(report.prompts))
    composite = report.composite
    return [
        {
            "prompt_id": prompt.id, "text": prompt.text, "category": prompt.category, "task": prompt.task,
            "keep": bool(admission.keep[p]), "reason": admission.reason[p],
            "range": _finite(float(admission.statistic[p])), "mean": _mean(composite[rows]),
            "n_valid": int((~composite[rows].isnan()).sum()), "n": len(rows),
            "state": state(admission, p), "threshold": _threshold(admission, p), "model": model,
            **{f"reward/{name}/mean": _mean(report.scores[rows, r][report.valid[rows, r]])
               for r, name in enumerate(report.names)},
            **{f"reward/{name}/range": _range(report.scores[rows, r][report.valid[rows, r]])
               for r, name in enumerate(report.names)},
        }
        for p, (prompt, rows) in enumerate(zip(report.prompts, groups, strict=True))
    ]  # fmt: skip


def state(admission: Admission, row: int) -> str:
    """The state of a prompt; of a filter that says none, whether it was kept."""
    if admission.state:
        return admission.state[row]
    return "active" if bool(admission.keep[row]) else "flat"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """All rows, or the file as it was."""
    columns = dict.fromkeys(key for row in rows for key in row)
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), temporary)
    temporary.replace(path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a ledger.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(
            f"there is no ledger to read at {path} ({error}). Run the stage '{path.parent.name}' first."
        ) from error
    return rows


def is_asleep(row: Mapping[str, Any]) -> bool:
    """Whether a prompt may be screened again; rows from before there were states say only that it was dropped."""
    return row["state"] in ASLEEP if row.get("state") else not row["keep"]


def by_category(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Prompts seen and kept, for each category."""
    seen = Counter(str(row["category"]) for row in rows)
    kept = Counter(str(row["category"]) for row in rows if row["keep"])
    return {name: {"prompts": seen[name], "kept": kept[name]} for name in sorted(seen)}


def states_by_category(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How many prompts are in which state, for each category."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(str(row["category"]), Counter())[str(row.get("state") or "active")] += 1
    return {category: dict(sorted(found[category].items())) for category in sorted(found)}


def _threshold(admission: Admission, row: int) -> float | None:
    return None if admission.threshold is None else _finite(float(admission.threshold[row]))


def _finite(value: float) -> float | None:
    return value if value == value else None


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


def _range(values: Tensor) -> float | None:
    known = values[torch.isfinite(values)]
    return float(known.max() - known.min()) if len(known) else None
