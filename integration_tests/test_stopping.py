"""A run that is asked to stop saves first; its output may be full or read-only, and its judge gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from velatura.core.checkpoint import load_latest

RECIPE = Path(__file__).with_name("recipes") / "kill.yaml"
SLOW = {"do": "sleep", "at": "velatura.core.stages.training:Training.save", "call": 3, "seconds": 3.0}
"""Long enough for a signal to come between two checkpoints, on any machine."""
STATUS = 75


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Path:
    """A folder in which the first two stages are done."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copy(RECIPE, folder / "kill.yaml")
    for stage in ("curate", "teacher"):
        assert forks.run("stage", "kill.yaml", stage, cwd=folder) == 0, (folder / "says.txt").read_text()
    return folder


@pytest.fixture
def curated(done: Path, tmp_path: Path) -> Path:
    """A copy of it without the second stage."""
    shutil.copytree(done, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "runs" / "kill" / "teacher")
    (tmp_path / "copy" / "says.txt").unlink()
    return tmp_path / "copy"


def weights(folder: Path) -> bytes:
    return (folder / "runs" / "kill" / "teacher" / "weights.safetensors").read_bytes()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def said_once(folder: Path, text: str) -> None:
    """One message of ours, with this in it, and no traceback."""
    said = (folder / "says.txt").read_text()
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("velatura: ") and "saving after" not in line]
    assert text in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_ends_its_step_saves_and_goes_on_later(
    number: signal.Signals, curated: Path, done: Path, forks: Any
) -> None:
    stage = curated / "runs" / "kill" / "teacher"
    command = ("run", "kill.yaml", "--stage", "teacher")
    pid = forks.start(*command, cwd=curated, faults=[SLOW])
    until((stage / "checkpoints" / "step-000002").exists, "no checkpoint")
    os.kill(pid, number)
    assert forks.wait(pid) == [STATUS]
    said_once(curated, f"{number.name}: stage 'teacher' is saved after step 3 of 6; the same command goes on")
    assert f"{number.name}: saving after this step" in (curated / "says.txt").read_text()
    assert json.loads((stage / "manifest.json").read_text())["status"] == "interrupted"
    newest = load_latest(stage / "checkpoints")
    assert newest is not None and newest.step == 3
    assert forks.run("stage", "kill.yaml", "teacher", cwd=curated) == 0
    assert weights(curated) == weights(done)


def test_a_second_ctrl_c_ends_it_at_once_and_what_was_saved_stays(curated: Path, done: Path, forks: Any) -> None:
    stage = curated / "runs" / "kill" / "teacher"
    pid = forks.start("run", "kill.yaml", "--stage", "teacher", cwd=curated, faults=[{**SLOW, "seconds": 200.0}])
    until((stage / "checkpoints" / "step-000002").exists, "no checkpoint")
    os.kill(pid, signal.SIGINT)
    until(lambda: "saving after this step" in (curated / "says.txt").read_text(), "the first one was not heard")
    os.kill(pid, signal.SIGINT)
    assert forks.wait(pid, seconds=60) == [130]
    newest = load_latest(stage / "checkpoints")
    assert newest is not None and newest.step == 2
    assert json.loads((stage / "manifest.json").read_text())["status"] == "interrupted"
    assert forks.run("stage", "kill.yaml", "teacher", cwd=curated) == 0
    assert weights(curated) == weights(done)


def test_stages_without_steps_stop_between_two_blocks(curated: Path, done: Path, forks: Any) -> None:
    """Curation keeps the block it is at; the rest is drawn later."""
    stage = curated / "runs" / "kill" / "curate"
    shutil.rmtree(stage)
    slow = {**SLOW, "at": "velatura.core.stages.curate:_save_block", "call": 1}
    command = ("run", "kill.yaml", "--stage", "curate", "sampling.batch=4")
    pid = forks.start(*command, cwd=curated, faults=[slow])
    until(lambda: stage.exists() and "curate" in (curated / "says.txt").read_text(), "not begun")
    time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    assert forks.wait(pid) == [STATUS]
    said_once(curated, "SIGTERM: stage 'curate' is saved as far as it is done")
    blocks = len(list((stage / "blocks").glob("*.safetensors")))
    assert blocks < 6
    assert forks.run("stage", "kill.yaml", "curate", "sampling.batch=4", cwd=curated) == 0
    assert len(list((stage / "blocks").glob("*.safetensors"))) == 6
    assert (stage / "kept.json").read_bytes() == (done / "runs" / "kill" / "curate" / "kept.json").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="the launcher's processes are found by psutil on Linux here")
def test_the_launcher_passes_the_request_on_and_leaves_with_the_same_status(curated: Path, forks: Any) -> None:
    """The real command with two processes: one message, one checkpoint, status 75."""
    stage = curated / "runs" / "kill" / "teacher"
    arguments = ["run", "kill.yaml", "--stage", "teacher", "engine.kind=deepspeed", "stages.teacher.steps=2000"]
    assert forks.run("stage", "kill.yaml", "curate", "engine.kind=deepspeed", cwd=curated) == 0
    command = [str(Path(sys.executable).with_name("velatura")), *arguments, "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    with (curated / "launched.txt").open("w") as log:
        launcher = subprocess.Popen(command, cwd=curated, env=environment, stdout=log, stderr=log)
        until(lambda: (stage / "checkpoints" / "step-000001").exists() or launcher.poll() is not None, "not begun")
        launcher.send_signal(signal.SIGTERM)
        status = launcher.wait(timeout=200)
    said = (curated / "launched.txt").read_text()
    assert status == STATUS, said
    (line,) = [line for line in said.splitlines() if "is saved after step" in line]
    assert line.startswith("velatura: SIGINT: stage 'teacher' is saved after step ")
    assert "Traceback" not in said and "killed by" not in said
    newest = load_latest(stage / "checkpoints")
    assert newest is not None and f"step {newest.step} of 2000" in line


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(curated: Path, done: Path, forks: Any) -> None:
    assert forks.run("stage", "kill.yaml", "teacher", cwd=curated, faults=[
        {"do": "kill", "at": "velatura.core.stages.training:Training.save", "call": 3}]) == -9  # fmt: skip
    (curated / "says.txt").unlink()
    full = {"do": "limit", "size": 20_000}
    assert forks.run("run", "kill.yaml", "--stage", "teacher", cwd=curated, faults=[full]) == 2
    said_once(curated, "What was saved before is intact; make room and run the same command again")
    newest = load_latest(curated / "runs" / "kill" / "teacher" / "checkpoints")
    assert newest is not None and newest.step == 2
    assert forks.run("stage", "kill.yaml", "teacher", cwd=curated) == 0
    assert weights(curated) == weights(done)


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user may read, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="velatura-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_output_is_told(curated: Path, readable: Path, forks: Any) -> None:
    shutil.copytree(curated, readable / "copy")
    folder = readable / "copy"
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    stranger = [{"do": "stranger"}] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as log:
        pid = forks.start("run", "kill.yaml", "--stage", "teacher", cwd=folder, faults=stranger, says=f"{log}/says.txt")
        assert forks.wait(pid) == [2]
        said_once(Path(log), "Permission denied")


def test_a_judge_that_is_down_ends_the_run_with_its_address(curated: Path, done: Path, forks: Any) -> None:
    """Nothing listens there; the next one takes another judge."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = f"{{server: 'http://127.0.0.1:{port}', reward: sharpness, retries: 0, deadline: 5, needs_card: false}}"
    away = f"stages.teacher.rewards=[{{use: http, with: {options}}}]"
    assert forks.run("run", "kill.yaml", "--stage", "teacher", away, cwd=curated) == 2
    said_once(curated, f"127.0.0.1:{port}")
    assert forks.run("stage", "kill.yaml", "teacher", cwd=curated) == 0
    assert weights(curated) == weights(done)


def test_the_slurm_script_of_the_documentation_puts_the_job_back_when_there_is_more_to_do(tmp_path: Path) -> None:
    """Run as SLURM runs it, with commands of the same names that only note what they are asked."""
    text = (Path(__file__).parents[1] / "docs" / "stopping.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", text, flags=re.DOTALL)
    (tmp_path / "job.sh").write_text(script)
    saves = "#!/bin/bash\ntrap 'sleep 0.5; echo saved >> log; exit 75' TERM\ntouch begun\nsleep 5 & wait\n"
    for name, content in (("velatura", saves), ("scontrol", '#!/bin/bash\necho "$@" >> log\n')):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)
    until((tmp_path / "begun").exists, "not begun")
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == STATUS
    assert (tmp_path / "log").read_text().splitlines() == ["saved", "requeue 42"]
