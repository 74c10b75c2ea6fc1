"""A stage that is killed with SIGKILL at random points and started again ends as if left alone, bit for bit.

Random points are calls of Velatura's own functions, of which a run makes some thousands, wherever they are: in a
rollout, a backward, amid the writing of a checkpoint. Unlike seconds they are spread evenly over a run on any machine.
The number of kills per stage is small in the ordinary suite; this makes it 20:

    VELATURA_KILLS=20 python -m pytest integration_tests/test_exactness.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).with_name("recipes") / "kill.yaml"
KILLS = int(os.environ.get("VELATURA_KILLS", "4"))
STAGES = ("curate", "teacher", "student", "compare")
WRITING = "velatura.core.checkpoint:"
DURING_WRITES = {
    "curate": ["velatura.core.stages.curate:_save_block", f"{WRITING}write_text_atomic"],
    "teacher": [f"{WRITING}_sync", f"{WRITING}save_file", f"{WRITING}_rename", f"{WRITING}_prune"],
    "student": [f"{WRITING}_sync", f"{WRITING}save_file", f"{WRITING}_rename", f"{WRITING}_prune"],
    "compare": ["velatura.core.stages.evaluate:_write_table", f"{WRITING}write_text_atomic"],
}
"""Functions that are amid writing what a resumed stage reads."""
SAME = ("weights.safetensors", "kept.json", "ledger.parquet", "prompts.parquet", "samples.parquet", "summary.json")


def result(stage: Path) -> dict[str, Any]:
    """All that a stage leaves, but for what a clock says."""
    found: dict[str, Any] = {name: (stage / name).read_bytes() for name in SAME if (stage / name).exists()}
    log = stage / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found["metrics"] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    last = sorted((stage / "checkpoints").glob("step-*"))[-1:]
    found |= {path.name: path.read_bytes() for folder in last for path in folder.iterdir()}
    found |= {path.name: path.read_bytes() for path in sorted((stage / "blocks").glob("*.safetensors"))}
    return found


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> tuple[Path, dict[str, int]]:
    """The folder of a run that was left alone, and how many functions each stage called."""
    folder, calls = tmp_path_factory.mktemp("uncut"), {}
    shutil.copy(RECIPE, folder / "kill.yaml")
    for stage in STAGES:
        report = folder / "calls"
        fault = {"do": "count", "report": str(report)}
        assert forks.run("stage", "kill.yaml", stage, cwd=folder, faults=[fault]) == 0, (
            folder / "says.txt"
        ).read_text()
        calls[stage] = int(report.read_text())
    return folder, calls


@pytest.fixture
def before(uncut: tuple[Path, dict[str, int]], tmp_path: Path) -> Callable[[str], Path]:
    """A fresh folder in which everything is done that comes before a stage."""

    def make(stage: str) -> Path:
        folder = tmp_path / "again"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(RECIPE, folder / "kill.yaml")
        for name in ["run.json", *STAGES[: STAGES.index(stage)]]:
            source, target = uncut[0] / "runs" / "kill" / name, folder / "runs" / "kill" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return folder

    return make


def point(stage: str, number: int, calls: int, rng: random.Random) -> dict[str, Any]:
    """Where the `number`-th kill strikes: every third amid a write, the others anywhere."""
    if number % 3 == 1:
        return {"do": "kill", "at": rng.choice(DURING_WRITES[stage]), "call": rng.randint(1, 4)}
    return {"do": "kill-anywhere", "call": rng.randint(1, calls)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_random_points_ends_as_if_left_alone(
    stage: str, uncut: tuple[Path, dict[str, int]], before: Callable[[str], Path], forks: Any
) -> None:
    rng, expected, calls = random.Random(f"kill {stage}"), result(uncut[0] / "runs" / "kill" / stage), uncut[1][stage]
    assert len(expected) > 1
    folder, killed, finished = before(stage), 0, 0
    while killed < KILLS or not finished:
        faults = [point(stage, killed, calls, rng)] if killed < KILLS else []
        status = forks.run("stage", "kill.yaml", stage, cwd=folder, faults=faults)
        said = (folder / "says.txt").read_text()
        assert status in (0, -9), said
        killed += status == -9
        if status == 0:  # what is left of a stage may be less than what a kill waits for
            assert result(folder / "runs" / "kill" / stage) == expected, f"after {killed} kills:\n{said}"
            folder, finished = before(stage), finished + 1
