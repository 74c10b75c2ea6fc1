"""Under launchers that are not ours: DeepSpeed's own command, and torchrun on two machines that are one.

One run folder goes through all of it: a stage under `deepspeed`, a stage under two agents of torchrun of which one is
lost, and the same command again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

RECIPE = Path(__file__).with_name("recipes") / "kill.yaml"
BIN = Path(sys.executable).parent
PATIENCE = 900
"""Seconds for what takes ten on a free machine."""
OPTIONS = ("engine.kind=deepspeed", "engine.timeout=120", "stages.teacher.steps=4")
Endings = list[tuple[int, str, str]]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(folder: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    """A launcher of this environment, which may ask no accelerator how many there are of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [str(BIN / program), *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def agents(folder: Path) -> list[subprocess.Popen[str]]:
    """torchrun as it is started on each of two machines."""
    port = free_port()
    return [
        start(folder, "torchrun", "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1", "--master-addr",
              "127.0.0.1", "--master-port", port, "-m", "velatura.core.cli", "run", "kill.yaml", *OPTIONS, "--stage",
              "teacher")
        for node in ("0", "1")
    ]  # fmt: skip


def endings(launchers: Sequence[subprocess.Popen[str]]) -> Endings:
    """Exit status, stdout and stderr of each."""
    try:
        texts = [launcher.communicate(timeout=PATIENCE) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    return [(launcher.returncode, *text) for launcher, text in zip(launchers, texts, strict=True)]


def wait_for(path: Path, launchers: Sequence[subprocess.Popen[str]]) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline
        for launcher in launchers:
            assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.01)


def worker_of(launcher: subprocess.Popen[str]) -> int:
    """The one process that an agent started."""
    (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(child)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    shutil.copy(RECIPE, folder)
    return folder


@pytest.fixture(scope="module")
def under_deepspeed(folder: Path) -> tuple[int, str, str]:
    """How its first stage ended."""
    launcher = start(
        folder, "deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "velatura.core.cli", "run",
        "kill.yaml", *OPTIONS, "--stage", "curate",
    )  # fmt: skip
    return endings([launcher])[0]


@pytest.fixture(scope="module")
def under_torchrun(folder: Path, under_deepspeed: object) -> list[Endings]:
    """How the agents ended when the first one's process was killed, and when they were started again."""
    if not Path("/proc/self/task").exists():
        pytest.skip("looks for processes in /proc")
    first = agents(folder)
    wait_for(folder / "runs" / "kill" / "teacher" / "checkpoints" / "step-000002", first)
    os.kill(worker_of(first[0]), signal.SIGKILL)
    lost = endings(first)
    shutil.copy(folder / "runs" / "kill" / "teacher" / "manifest.json", folder / "lost.json")
    return [lost, endings(agents(folder))]


def test_deepspeeds_own_command_starts_a_run(folder: Path, under_deepspeed: tuple[int, str, str]) -> None:
    """It puts --local_rank before the command, and numbers processes in variables."""
    status, out, said = under_deepspeed
    assert status == 0, said
    run = folder / "runs" / "kill"
    assert json.loads((run / "curate" / "manifest.json").read_text())["status"] == "finished"
    assert "velatura: " not in said + out
    assert "curate: curate" in (run / "logs" / "process-1.log").read_text()
    assert [path.name for path in (run / "logs").iterdir()] == ["process-1.log"]


def test_a_lost_process_ends_both_machines_and_is_named(folder: Path, under_torchrun: list[Endings]) -> None:
    """Also in the run folder, by a process that is not the first."""
    (first, second), _ = under_torchrun
    assert first[0] != 0 and second[0] != 0
    told = [line for line in (first[2] + second[2]).splitlines() if line.startswith("velatura: ")]
    assert len(told) == 1 and told[0].startswith("velatura: process 0 on ")
    manifest = json.loads((folder / "lost.json").read_text())
    assert (manifest["status"], f"velatura: {manifest['error']}") == ("interrupted", told[0])


def test_the_same_commands_go_on(folder: Path, under_torchrun: list[Endings]) -> None:
    _, (first, second) = under_torchrun
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "teacher: goes on from step" in first[1]
    assert "velatura: " not in first[2] + second[2]
    run = folder / "runs" / "kill" / "teacher"
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
