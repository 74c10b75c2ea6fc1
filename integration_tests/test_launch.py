"""Several machines, tried with real processes on one: srun's variables, DeepSpeed's launcher, and what ends a run.

`pdsh` and `ssh` are stand-ins that run on this machine what they are asked to run on others; everything behind them,
DeepSpeed's launcher included, is real.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Run = Callable[..., subprocess.CompletedProcess[str]]
RECIPES = Path(__file__).with_name("recipes")
COMMAND = str(Path(sys.executable).with_name("velatura"))
PATIENCE = 600
"""Seconds for what takes ten on a free machine."""
PDSH = """#!{python}
# pdsh -S -f N -w HOSTS -N WORD ...: every host is this machine.
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
rest = words[words.index("-N") + 1 :]
started = [subprocess.Popen(["sh", "-c", " ".join(rest).replace("%n", str(n))]) for n in range(len(hosts))]
sys.exit(max(process.wait() for process in started))
"""
SSH = """#!/bin/sh
# ssh -o X -o Y HOST hostname -I
case "$5" in nowhere*) echo "ssh: could not resolve $5" >&2; exit 255;; esac
echo 127.0.0.1
"""


def place(folder: Path) -> Path:
    """A folder with the recipe of these tests."""
    folder.mkdir(exist_ok=True)
    for name in ("launched.yaml",):
        shutil.copy(RECIPES / name, folder / name)
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def of_step() -> list[dict[str, str]]:
    """The variables of the two tasks of a job step, one on each of two nodes."""
    port = str(free_port())
    return [{
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank), "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
    } for rank in (0, 1)]  # fmt: skip


def srun(folder: Path) -> list[subprocess.Popen[str]]:
    """Both tasks, as srun starts them; nobody ends one when another ends."""
    return [
        subprocess.Popen(
            [COMMAND, "run", "launched.yaml"], cwd=folder, env={**os.environ, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for variables in of_step()
    ]  # fmt: skip


def endings(tasks: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    try:
        said = [task.communicate(timeout=PATIENCE) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, *texts) for task, texts in zip(tasks, said, strict=True)]


Cut = tuple[Path, list[list[tuple[int, str, str]]]]


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Cut:
    """A run under srun's variables that lost its first process and was started again; and how its processes ended. The
    second time they are forked: importing all again would take longer than the run."""
    folder = place(tmp_path_factory.mktemp("srun"))
    tasks = srun(folder)
    deadline = time.monotonic() + PATIENCE
    while not (folder / "runs" / "launched" / "teacher" / "checkpoints" / "step-000002").exists():
        assert time.monotonic() < deadline
        assert tasks[0].poll() is None, tasks[0].communicate()
        time.sleep(0.01)
    tasks[0].send_signal(signal.SIGKILL)
    first, command = endings(tasks), ("run", "launched.yaml")
    again = [
        forks.start(*command, cwd=folder, environment=variables, says=f"out-{rank}", errors=f"err-{rank}")
        for rank, variables in enumerate(of_step())
    ]
    statuses = forks.wait(*again, seconds=PATIENCE)
    texts = [[(folder / f"{name}-{rank}").read_text() for name in ("out", "err")] for rank in (0, 1)]
    second = [(status, out, err) for status, (out, err) in zip(statuses, texts, strict=True)]
    return folder / "runs" / "launched", [first, second]


def test_a_first_process_that_is_killed_ends_all_and_is_named(cut_off: Cut) -> None:
    """It held what the processes meet at, and nothing but the others can say that it is gone."""
    _, ((first, second), _) = cut_off
    assert (first[0], second[0]) == (-signal.SIGKILL, 2)
    assert second[2].startswith("velatura: process 0 on localhost cannot be reached any more")
    assert second[2].count("\n") == 1


def test_what_was_cut_off_goes_on(cut_off: Cut) -> None:
    run, (_, (first, second)) = cut_off
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "goes on from step" in first[1]
    assert second[1:] == ("", "")
    assert "teacher: rl" in (run / "logs" / "process-1.log").read_text()


@pytest.fixture
def programs(tmp_path: Path) -> Mapping[str, str]:
    """The variable that puts `pdsh` and `ssh` of these tests before all others."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in (("pdsh", PDSH.format(python=sys.executable)), ("ssh", SSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_two_machines_of_a_hostfile_do_what_two_tasks_do(
    cut_off: Cut, programs: Mapping[str, str], tmp_path: Path
) -> None:
    """Bit for bit, though the other run was cut off."""
    folder = place(tmp_path / "hosts")
    (folder / "hosts").write_text("# two names of one machine\nlocalhost slots=1\n127.0.0.1 slots=1  # the other\n")
    quoted = 'stages.teacher.rewards.0={use: tinyworld-sharpness, name: "sharpness"}'
    done = subprocess.run(
        [COMMAND, "run", "launched.yaml", "--hostfile", "hosts", quoted], cwd=folder, text=True, capture_output=True,
        env={**os.environ, **programs, "OMP_NUM_THREADS": "1"}, timeout=PATIENCE, check=False, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / "launched"
    assert (run / "logs" / "process-1.log").exists()
    mine, theirs = (load_file(path / "teacher" / "weights.safetensors") for path in (run, cut_off[0]))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert json.loads((run / "teacher" / "manifest.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("localhost\n", "hosts, line 1: 'localhost' is no machine. Write its name and how many processes it gets"),
        ("a slots=0\n", "line 1: 'a slots=0' is no machine"),
        ("a slots=2\n\na slots=1\n", "line 3: 'a' is there twice"),
        ("# nobody\n", "hosts names no machine"),
        ("localhost slots=1\nnowhere-1 slots=1\n", "ssh does not reach nowhere-1 (ssh: could not resolve nowhere-1)"),
    ],
)
def test_a_bad_hostfile_is_one_message(
    tmp_path: Path, programs: Mapping[str, str], velatura: Run, lines: str, said: str
) -> None:
    folder = place(tmp_path / "hosts")
    (folder / "hosts").write_text(lines)
    done = velatura("run", "launched.yaml", "--hostfile", "hosts", cwd=folder, status=2, environment=programs)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "runs").exists()


def test_who_waits_for_a_process_that_never_comes_says_so(tmp_path: Path, velatura: Run) -> None:
    folder, (first, _) = place(tmp_path / "alone"), of_step()
    said = velatura("run", "launched.yaml", "engine.timeout=2", cwd=folder, status=2, environment=first).stderr
    assert said.count("velatura: ") == 1
    assert "process 0 did not meet the other processes at localhost:" in said
    assert "within 2 s" in said
    assert "Are all 2 started" in said
