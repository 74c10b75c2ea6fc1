"""A run that is killed and started again ends as if it had been left alone, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
TINY = Path(__file__).with_name("recipes") / "tiny.yaml"
KILLED = {"warm": (3, 6), "teacher_t2i": (2, 4, 6, 8), "student": (2, 4, 6, 8)}
"""Supervised training, reinforcement learning, distillation; and the checkpoints after which there is work left."""
TRAINED = (*KILLED, "teacher_edit")


def kill_during(forks: Any, pid: int, stage: Path, rng: random.Random) -> str:
    """SIGKILL at some moment after one of the stage's checkpoints; the checkpoint that was the newest then."""
    checkpoints, step = stage / "checkpoints", rng.choice(KILLED[stage.name])
    deadline = time.monotonic() + 120
    while not any(int(path.name.removeprefix("step-")) >= step for path in checkpoints.glob("step-*")):
        assert forks.wait(pid, seconds=0.005) == [None], "the run ended before it could be killed"
        assert time.monotonic() < deadline
    time.sleep(rng.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert forks.wait(pid) == [-signal.SIGKILL]
    assert not (stage / "weights.safetensors").exists(), "the stage was over before the process was killed"
    return max(path.name for path in checkpoints.glob("step-*"))


@pytest.fixture(scope="module")
def killed_run(
    tmp_path_factory: pytest.TempPathFactory, forks: Any, velatura: Run, deepspeed_arguments: tuple[str, ...]
) -> tuple[Path, str]:
    """The folder of a run that was killed in three stages, and what its last process said."""
    folder, rng = tmp_path_factory.mktemp("killed"), random.Random(0)
    shutil.copy(TINY, folder / "tiny.yaml")
    run = folder / "runs" / "tiny"
    for stage in KILLED:
        newest = kill_during(forks, forks.start(*deepspeed_arguments, cwd=folder), run / stage, rng)
        assert json.loads((run / stage / "manifest.json").read_text())["status"] == "running"
        assert newest >= "step-000002"
    return run, velatura(*deepspeed_arguments, cwd=folder).stdout


def test_a_killed_run_goes_on_from_its_checkpoint(killed_run: tuple[Path, str]) -> None:
    assert "student: goes on from step " in killed_run[1]
    assert "teacher_t2i: finished before and unchanged" in killed_run[1]


@pytest.mark.parametrize("stage", TRAINED)
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(
    stage: str, killed_run: tuple[Path, str], deepspeed_run: Path
) -> None:
    name = f"{stage}/weights.safetensors"
    assert (killed_run[0] / name).read_bytes() == (deepspeed_run / name).read_bytes()


def metrics(run: Path, stage: str) -> list[dict[str, float]]:
    """All that was logged, but for what a clock says."""
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.parametrize("stage", TRAINED)
def test_a_killed_run_logs_every_step_once_and_the_same(
    stage: str, killed_run: tuple[Path, str], deepspeed_run: Path
) -> None:
    assert metrics(killed_run[0], stage) == metrics(deepspeed_run, stage)


def test_the_pictures_and_the_comparison_are_the_same(killed_run: tuple[Path, str], deepspeed_run: Path) -> None:
    drawn = {path.relative_to(deepspeed_run) for path in deepspeed_run.glob("*/pictures/*.png")}
    assert drawn
    assert {path.relative_to(killed_run[0]) for path in killed_run[0].glob("*/pictures/*.png")} == drawn
    for path in (*drawn, Path("compare/samples.parquet"), Path("curate_t2i/kept.json")):
        assert (killed_run[0] / path).read_bytes() == (deepspeed_run / path).read_bytes(), path
