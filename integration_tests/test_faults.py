"""Two real processes, of which one dies, stands still or cannot write: no hang, one message, nothing lost.

They have no launcher above them: what is tested is what they find out by themselves. Afterwards one process goes on
from what is there, and ends with the weights that two ended with that were left alone. For processes that stand still
see test_watch.py.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from velatura.core.checkpoint import load_latest

RECIPE = Path(__file__).with_name("recipes") / "kill.yaml"
TWO = ("engine.kind=deepspeed", "engine.timeout=120")
STAGE = ("run", "kill.yaml", "--stage", "teacher", *TWO)
PLACES = {
    "rollout": (1, "velatura.core.stages.rl:rollout", 3),
    "judging": (1, "velatura.core.asking:once", 3),
    "backward": (1, "velatura.core.engine.deepspeed:DeepSpeedEngine.backward", 7),
    "optimiser": (1, "velatura.core.engine.deepspeed:DeepSpeedEngine.step", 4),
    "collective": (0, "velatura.core.engine.deepspeed:dist.all_gather_object", 40),
    "checkpoint": (0, "velatura.core.checkpoint:_rename", 3),
}
"""What a process is at -> which one, the function that does it, and the call of it in the third step or so."""
Endings = dict[str, tuple[Path, list[int | None]]]
"""Place -> folder and exit statuses."""


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


def fresh(done: Path, folder: Path) -> Path:
    """A copy of it without the second stage."""
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "runs" / "kill" / "teacher")
    shutil.rmtree(folder / "runs" / "kill" / "logs", ignore_errors=True)
    for path in folder.glob("says-*.txt"):
        path.unlink()
    return folder


@pytest.fixture
def curated(done: Path, tmp_path: Path) -> Path:
    return fresh(done, tmp_path / "copy")


def begin(
    forks: Any, folder: Path, *faults: dict[str, Any], rank: int = 1, command: tuple[str, ...] = STAGE
) -> list[int]:
    """Two processes that do a stage, of which `rank` has `faults`."""
    where = port()
    return [
        forks.start(*command, cwd=folder, faults=faults if number == rank else (), rank=(number, 2, where),
                    says=f"says-{number}.txt")
        for number in (0, 1)
    ]  # fmt: skip


def both(
    forks: Any, folder: Path, *faults: dict[str, Any], rank: int = 1, command: tuple[str, ...] = STAGE
) -> list[int | None]:
    """How they ended."""
    statuses: list[int | None] = forks.wait(*begin(forks, folder, *faults, rank=rank, command=command), seconds=200)
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


@pytest.fixture(scope="module")
def killed(
    done: Path, tmp_path_factory: pytest.TempPathFactory, forks: Any
) -> dict[str, tuple[Path, list[int | None]]]:
    """Place -> folder and statuses of two processes, one of which was killed there. Pairs run beside each other: they
    mostly wait."""
    found = {}
    for some in (list(PLACES)[:3], list(PLACES)[3:]):
        started = {}
        for place in some:
            rank, at, call = PLACES[place]
            folder = fresh(done, tmp_path_factory.mktemp(place) / "copy")
            started[place] = folder, begin(forks, folder, {"do": "kill", "at": at, "call": call}, rank=rank)
        for place, (folder, pids) in started.items():
            found[place] = folder, forks.wait(*pids, seconds=200)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_process_that_is_killed_ends_the_other_and_is_named(
    place: str, killed: Endings, done: Path, forks: Any
) -> None:
    """The first process puts checkpoints in their place, so it is the one to die there."""
    (folder, statuses), rank = killed[place], PLACES[place][0]
    assert statuses[rank] == -9, said(folder)
    assert statuses[1 - rank] == 2, said(folder)
    (message,) = said(folder)
    assert f"process {rank} " in message
    newest = load_latest(checkpoints(folder))
    assert newest is not None and 1 <= newest.step < 6
    goes_on(folder, done, forks)


def test_an_error_that_nobody_expected_is_told_once_with_its_process(curated: Path, forks: Any) -> None:
    _, at, call = PLACES["rollout"]
    statuses = both(forks, curated, {"do": "raise", "at": at, "call": call})
    assert None not in statuses and 0 not in statuses
    (message,) = said(curated)
    assert "process 1 " in message and "something that nobody expected" in message
    assert load_latest(checkpoints(curated)) is not None


def test_a_slow_process_is_waited_for(curated: Path, done: Path, forks: Any) -> None:
    _, at, call = PLACES["rollout"]
    assert both(forks, curated, {"do": "sleep", "at": at, "call": call, "seconds": 6.0}) == [0, 0]
    assert said(curated) == []
    files = [folder / "runs" / "kill" / "teacher" / "weights.safetensors" for folder in (curated, done)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_full_disk_ends_both_with_one_message(saved: Path, tmp_path: Path, done: Path, forks: Any) -> None:
    curated = tmp_path / "copy"
    shutil.copytree(saved, curated)
    statuses = both(forks, curated, {"do": "limit", "size": 20_000}, rank=0)
    assert None not in statuses and 0 not in statuses
    (message,) = said(curated)
    assert "cannot write" in message and "What was saved before is intact" in message
    newest = load_latest(checkpoints(curated))
    assert newest is not None and newest.step == 4
    goes_on(curated, done, forks)


@pytest.fixture(scope="module")
def saved(done: Path, tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Path:
    """A folder in which the second stage was killed after its fourth checkpoint."""
    folder = tmp_path_factory.mktemp("saved") / "copy"
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "runs" / "kill" / "teacher")
    fault = {"do": "kill", "at": "velatura.core.stages.training:Training.save", "call": 5}
    assert both(forks, folder, fault, rank=0)[0] == -9
    for path in folder.glob("says*.txt"):
        path.unlink()
    return folder


def missing(newest: Path) -> None:
    next(newest.glob("*.safetensors")).unlink()


def truncated(newest: Path) -> None:
    path = max(newest.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-9])


def of_another_step(newest: Path) -> None:
    """Whole files, of the checkpoint before."""
    older = sorted(newest.parent.glob("step-*"))[-2]
    path = max(newest.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    shutil.copy(older / path.name, path)


@pytest.mark.parametrize("damage", [missing, truncated, of_another_step])
def test_a_damaged_checkpoint_is_told_once_and_the_one_before_is_used(
    damage: Any, saved: Path, done: Path, tmp_path: Path, forks: Any
) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    folder = tmp_path / "copy"
    newest = sorted(checkpoints(folder).glob("step-*"))[-1]
    damage(newest)
    assert both(forks, folder) == [0, 0], said(folder)
    first = (folder / "says-0.txt").read_text()
    assert first.count("cannot be used") == 1 and newest.name in first
    assert f"goes on from step {int(newest.name[5:]) - 1}" in first
    files = [place / "runs" / "kill" / "teacher" / "weights.safetensors" for place in (folder, done)]
    assert files[0].read_bytes() == files[1].read_bytes()


DIFFERENT = {
    "stages.teacher.objective.with.beta=0.7": "before the first update of stage 'teacher' process 1 has another recipe",
    "adapter.with.seed=9": "at the start of stage 'teacher' process 1 holds other weights than process 0, first in",
}
"""What is another in the second process -> what is said of it."""


@pytest.mark.parametrize("change", DIFFERENT)
def test_processes_that_are_about_to_do_different_things_are_refused(change: str, curated: Path, forks: Any) -> None:
    """As when the recipe was edited in between, or a machine has another file of the same name."""
    where = port()
    pids = [
        forks.start(*STAGE, *changes, cwd=curated, rank=(number, 2, where), says=f"says-{number}.txt")
        for number, changes in ((0, ()), (1, (change,)))
    ]
    assert forks.wait(*pids, seconds=200) == [2, 2], said(curated)
    (message,) = said(curated)
    assert DIFFERENT[change] in message
    assert not checkpoints(curated).exists()


def test_a_loss_that_is_not_finite_on_one_process_is_stepped_on_by_none(curated: Path, forks: Any) -> None:
    """Both skip the update, and each keeps its part."""
    fault = {"do": "nan", "at": "velatura.plugins.objectives.nft:NFT.loss", "call": 6}
    assert both(forks, curated, fault) == [0, 0], (curated / "says-1.txt").read_text()
    run = curated / "runs" / "kill" / "teacher"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["skipped"] for row in rows) == 1 and min(row["updated"] for row in rows) == 0.5
    (kept,) = (run / "nonfinite").iterdir()
    assert json.loads((kept / "batch.json").read_text())["faults"] == ["the loss of micro-batch 0 of process 1 is nan"]
    assert len(json.loads((kept / "process-0.json").read_text())) == 0
    assert len(json.loads((kept / "process-1.json").read_text())) == 1
    final = load_file(run / "weights.safetensors")
    assert {n: v.shape for n, v in load_file(kept / "policy.safetensors").items()} == {
        n: v.shape for n, v in final.items()
    }
    assert all(bool(value.isfinite().all()) for value in final.values())
    assert forks.run("replay", kept, cwd=curated) == 0
    assert "process 1, micro-batch 0: all is finite" in (curated / "says.txt").read_text()
