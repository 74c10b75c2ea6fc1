"""How far apart a prompt's samples are while a policy is trained: for free, from the rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from velatura.core.ledger import Row, read_rows, state, write_rows
from velatura.core.spread import expected_range
from velatura.core.types import Admission, RewardReport, group_rows

FILE = "prompts.parquet"
REMEMBERED = 0.7
"""Share of the mean range that stays when a prompt is seen again."""


@dataclass(slots=True)
class TrainingLedger:
    """One row for each prompt that was seen, or that a curate stage measured: its latest range D, and a running mean,

    mean <- .7 mean + .3 D,    D the range of the composite of its samples.

    Ranges of other numbers of samples are brought to `group_size`, by what a bell's range is expected to be. A step
    that is repeated after an interruption changes nothing: it draws the same samples.
    """

    path: Path
    group_size: int
    rows: dict[str, Row]
    writes: bool = True
    """One of the processes does."""

    @classmethod
    def open(cls, path: Path, group_size: int, curated: Path | None, *, writes: bool = True) -> Self:
        """The ledger of a run that goes on, or one that begins with what was curated."""
        if path.exists():
            rows = read_rows(path)
        else:
            rows = [_curated(row, group_size) for row in read_rows(curated)] if curated is not None else []
        known = {row["prompt_id"]: row for row in rows}
        return cls(path=path, group_size=group_size, rows=known, writes=writes)

    def refresh(self, step: int, report: RewardReport, admission: Admission | None) -> None:
        """Take in the groups of a step, and write."""
        composite = report.composite
        for p, rows in enumerate(group_rows(report.group, len(report.prompts))):
            prompt = report.prompts[p]
            known = self.rows.get(prompt.id, {})
            if known.get("step") is not None and known["step"] >= step:
                continue
            values = composite[rows]
            values = values[~values.isnan()]
            self.rows[prompt.id] = {
                "prompt_id": prompt.id, "category": prompt.category, "task": prompt.task, "step": step,
                "seen": int(known.get("seen") or 0) + 1, "n": len(rows), "n_valid": len(values),
                **self._ranges(values, known), **_said(admission, p, values),
            }  # fmt: skip
        if self.writes:
            write_rows(self.path, list(self.rows.values()))

    def _ranges(self, values: torch.Tensor, known: Mapping[str, Any]) -> dict[str, float | None]:
        """The latest range and the mean; a group with too few scores leaves both as they were."""
        before = known.get("mean_range")
        if len(values) < 2:
            return {"range": known.get("range"), "mean_range": before}
        latest = float(values.max() - values.min()) * expected_range(self.group_size) / expected_range(len(values))
        mean = latest if before is None else REMEMBERED * float(before) + (1 - REMEMBERED) * latest
        return {"range": latest, "mean_range": mean}

    def metrics(self) -> dict[str, float]:
        """Mean over the prompts seen of their mean range, and the share of those that are not active."""
        seen = [row for row in self.rows.values() if row["seen"]]
        ranges = [float(row["mean_range"]) for row in seen if row["mean_range"] is not None]
        asleep = sum(row["state"] != "active" for row in seen)
        return {
            "prompts/seen": float(len(seen)), "prompts/mean_range": sum(ranges) / max(1, len(ranges)),
            "prompts/not_active": asleep / max(1, len(seen)),
        }  # fmt: skip


def admission_metrics(admission: Admission | None) -> dict[str, float]:
    """What an online filter dropped of a step's groups, state by state, in shares."""
    if admission is None:
        return {}
    count = len(admission.keep)
    found = {"filter/dropped": 1 - float(admission.keep.float().mean())}
    for p in range(count):
        if not bool(admission.keep[p]):
            key = f"filter/{state(admission, p)}"
            found[key] = found.get(key, 0.0) + 1 / count
    return found


def _said(admission: Admission | None, row: int, values: torch.Tensor) -> dict[str, Any]:
    """State and reason: the filter's, or without one whether there was anything to learn."""
    if admission is not None:
        threshold = None if admission.threshold is None else float(admission.threshold[row])
        return {
            "state": state(admission, row), "reason": admission.reason[row],
            "threshold": threshold if threshold is not None and threshold == threshold else None,
        }  # fmt: skip
    if len(values) < 2:
        return {"state": "failed", "reason": "too few valid scores", "threshold": None}
    flat = float(values.max()) == float(values.min())
    return {"state": "flat" if flat else "active", "reason": "every sample scores the same" if flat else "",
            "threshold": None}  # fmt: skip


def _curated(row: Row, group_size: int) -> Row:
    """Where a prompt stood before training."""
    known, count = row["range"], int(row["n_valid"])
    scaled = None
    if known is not None and count > 1:
        scaled = float(known) * expected_range(group_size) / expected_range(count)
    return {
        "prompt_id": row["prompt_id"], "category": row["category"], "task": row["task"], "step": None, "seen": 0,
        "n": int(row["n"]), "n_valid": count, "range": scaled, "mean_range": scaled,
        "state": row.get("state") or ("active" if row["keep"] else "flat"), "reason": row["reason"],
        "threshold": row.get("threshold"),
    }  # fmt: skip
