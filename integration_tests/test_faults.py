"""Two real processes, of which one dies, stands still or cannot write: no hang, one message, the last good state intact.

The processes have no launcher above them: what is tested is what they find out by themselves. Afterwards one process goes
on from what is there, and ends with the weights that two ended with that were left alone.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from velatura.core.checkpoint import load_checkpoint, load_latest

RECIPE = Path(__file__).with_name("recipes") / "kill.yaml"
TWO = ("engine.kind=deepspeed", "engine.timeout=20")
STAGE = ("run", "kill.yaml", "--stage", "teacher", *TWO)
PLACES = {
    "rollout": ("velatura.core.stages.rl:rollout", 3),
    "judging": ("velatura.core.asking:once", 3),
    "backward": ("velatura.core.engine.deepspeed:DeepSpeedEngine.backward", 7),
    "a collective": ("velatura.core.engine.deepspeed:dist.all_gather_object", 12),
    "an optimiser step": ("velatura.core.engine.deepspeed:DeepSpeedEngine.step", 4),
}
"""What a process is at -> the function that does it, and the call of it in the third step or so."""
WRITING = ("velatura.core.checkpoint:_sync", 12)


def port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Path:
    """A folder in which two processes have done the first two stages undisturbed."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copy(RECIPE, folder / "kill.yaml")
    for stage in ("curate", "teacher"):
        assert both(forks, folder, command=("run", "kill.yaml", "--stage", stage, *TWO)) == [0, 0], said(folder)
    return folder


@pytest.fixture
def curated(done: Path, tmp_path: Path) -> Path:
    """A copy of it without the second stage."""
    shutil.copytree(done, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "runs" / "kill" / "teacher")
    shutil.rmtree(tmp_path / "copy" / "runs" / "kill" / "logs", ignore_errors=True)
    for path in (tmp_path / "copy").glob("says-*.txt"):
        path.unlink()
    return tmp_path / "copy"


def both(
    forks: Any, folder: Path, *faults: dict[str, Any], rank: int = 1, command: tuple[str, ...] = STAGE
) -> list[int | None]:
    """Statuses of two processes that do a stage, of which `rank` has `faults`."""
    where = port()
    pids = [
        forks.start(*command, cwd=folder, faults=faults if number == rank else (), rank=(number, 2, where),
                    says=f"says-{number}.txt")
        for number in (0, 1)
    ]  # fmt: skip
    statuses: list[int | None] = forks.wait(*pids, seconds=200)
    return statuses


def said(folder: Path) -> list[str]:
    """The messages of both processes."""
    lines = [line for path in sorted(folder.glob("says-*.txt")) for line in path.read_text().splitlines()]
    return [line for line in lines if line.startswith("velatura: ")]


def checkpoints(folder: Path) -> Path:
    return folder / "runs" / "kill" / "teacher" / "checkpoints"


def goes_on(folder: Path, done: Path, forks: Any) -> None:
    """What is there is complete, and one process makes of it what two made, but for the order of sums."""
    status = forks.run(*STAGE, cwd=folder)
    assert status == 0, (folder / "says.txt").read_text()
    assert "goes on from step" in (folder / "says.txt").read_text()
    found, expected = (load_file(f / "runs" / "kill" / "teacher" / "weights.safetensors") for f in (folder, done))
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-3


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_process_that_is_killed_ends_the_other_and_is_named(
    place: str, rank: int, curated: Path, done: Path, forks: Any
) -> None:
    at, call = PLACES[place]
    statuses = both(forks, curated, {"do": "kill", "at": at, "call": call}, rank=rank)
    assert statuses[rank] == -9
    assert statuses[1 - rank] == 2, said(curated)
    (message,) = said(curated)
    assert f"process {rank} " in message
    assert "goes on from the last checkpoint" in message
    assert load_latest(checkpoints(curated)) is not None
    if rank == 1:
        goes_on(curated, done, forks)
