"""What a run folder holds, read with patience: an unfinished or damaged run still has something to show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from velatura.core.errors import VelaturaError
from velatura.core.report.samples import SAMPLES, Evaluation, read_evaluation

ASIDE = "replaced"
"""Folder of results that a later run replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage folder of a run."""

    name: str
    kind: str
    """`rl`, `curate`, ...; from the recipe when the stage has not run."""
    status: str
    """`finished`, `running`, `failed`, `interrupted`, or `not run`."""
    folder: Path
    seconds: float | None = None
    started: str = ""
    error: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder."""

    folder: Path
    stages: tuple[Stage, ...]
    """In the order of the recipe."""
    recipe: str
    """`recipe.yaml` as given; empty when missing."""
    resolved: Mapping[str, Any]
    """`resolved.json`; empty when missing."""
    notes: list[str]
    """What is missing or cannot be read, in words."""

    def of_kind(self, *kinds: str) -> list[Stage]:
        """Stages of some kinds that left something."""
        return [stage for stage in self.stages if stage.kind in kinds and stage.folder.is_dir()]


def read_run(folder: Path) -> Run:
    """Look at a run folder.

    Raises:
        VelaturaError: there is nothing of a run in it.
    """
    if not folder.is_dir():
        raise VelaturaError(f"{folder} is not a folder. Name the folder of a run, for example runs/tinyworld.")
    notes: list[str] = []
    resolved = read_json(folder / "resolved.json", notes)
    recipe_path = folder / "recipe.yaml"
    recipe = recipe_path.read_text(errors="replace") if recipe_path.exists() else ""
    if not recipe:
        notes.append("recipe.yaml is missing, so the recipe cannot be shown as it was written.")
    stages = _stages(folder, resolved.get("recipe", {}).get("stages", {}), notes)
    if not (recipe or resolved or stages):
        raise VelaturaError(f"{folder} holds no run: neither recipe.yaml nor the folder of a stage.")
    return Run(folder=folder, stages=tuple(stages), recipe=recipe, resolved=resolved, notes=notes)


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; when it is missing or broken, an empty one and a note."""
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        notes.append(f"{_place(path)} is missing.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{_place(path)} cannot be read: {error}.")
        return {}
    return loaded if isinstance(loaded, dict) else {}


def read_metrics(stage: Stage, notes: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Metric -> (step, value) pairs; lines that were cut off are left out."""
    path, series = stage.folder / "metrics.jsonl", {}  # type: tuple[Path, dict[str, list[tuple[float, float]]]]
    if not path.exists():
        return series
    broken = 0
    for line in filter(str.strip, path.read_text(errors="replace").splitlines()):
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, KeyError, TypeError):
            broken += 1
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and value == value:
                series.setdefault(name, []).append((step, float(value)))
    if broken:
        notes.append(f"{_place(path)}: {broken} unreadable line{'s' * (broken > 1)} left out.")
    return series


def read_ledger(stage: Stage, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a curation ledger, one a prompt."""
    path = stage.folder / "ledger.parquet"
    if not path.exists():
        return []
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        notes.append(f"{_place(path)} cannot be read: {error}.")
        return []
    return rows


def read_samples(stage: Stage, notes: list[str]) -> Evaluation | None:
    """The evaluation of a stage, if there is one to read."""
    if not (stage.folder / SAMPLES).exists():
        return None
    try:
        return read_evaluation(stage.folder)
    except VelaturaError as error:
        notes.append(str(error))
        return None


def read_pictures(stage: Stage, notes: list[str]) -> list[tuple[Path, str]]:
    """The grids that a stage drew, by name, with their captions."""
    folder = stage.folder / "pictures"
    found = sorted(folder.glob("*.png"))
    captions = read_json(folder / "captions.json", notes) if (folder / "captions.json").exists() else {}
    return [(path, str(captions.get(path.name, ""))) for path in found]


def _stages(folder: Path, planned: Mapping[str, Any], notes: list[str]) -> list[Stage]:
    """Those of the recipe in its order, then any others by the time they started."""
    present = {path.parent.name for path in folder.glob("*/manifest.json")} - {ASIDE}
    listed = [_stage(folder, name, str((planned[name] or {}).get("stage", "")), notes) for name in planned]
    extra = [_stage(folder, name, "", notes) for name in sorted(present - set(planned))]
    notes += _unfinished(listed + extra)
    return listed + sorted(extra, key=lambda stage: stage.started)


def _stage(folder: Path, name: str, kind: str, notes: list[str]) -> Stage:
    path = folder / name / "manifest.json"
    manifest = read_json(path, notes) if path.exists() else {}
    seconds = manifest.get("seconds")
    return Stage(
        name=name,
        kind=str(manifest.get("kind", kind)),
        status=str(manifest.get("status", "not run")),
        folder=folder / name,
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        started=str(manifest.get("started", "")),
        error=str(manifest.get("error", "")),
        inputs=manifest.get("inputs") or {},
        result=manifest.get("result") or {},
    )


def _unfinished(stages: Iterable[Stage]) -> list[str]:
    words = {
        "running": "was still running, or was killed, when this page was made",
        "failed": "failed",
        "interrupted": "was interrupted",
        "not run": "has not run",
    }
    return [
        f"Stage {stage.name} {words.get(stage.status, stage.status)}{': ' + stage.error if stage.error else ''}."
        for stage in stages
        if stage.status != "finished"
    ]


def _place(path: Path) -> str:
    """`stage/file`, short enough to read."""
    return "/".join(path.parts[-2:])
