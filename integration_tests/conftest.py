"""Runs of the tiny recipe, each done once a session by the real command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(sys.executable).with_name("velatura")
TINY = Path(__file__).with_name("recipes") / "tiny.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def velatura() -> Run:
    """The `velatura` command as a process; it has to succeed unless `status` says otherwise."""

    def run(*arguments: object, cwd: Path, status: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
        command = [str(COMMAND), *map(str, arguments)]
        done = subprocess.run(  # type: ignore[call-overload]
            command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False, **options
        )
        assert done.returncode == status, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """The `velatura` command, left running."""

    def run(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
        command = [str(COMMAND), *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        )

    return run


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, velatura: Run) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with the recipe and its finished run (plain torch), which no test may change; and what was printed."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copy(TINY, folder / "tiny.yaml")
    return folder, velatura("run", "tiny.yaml", cwd=folder)


@pytest.fixture
def workspace(original: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, and the current one."""
    folder = tmp_path / "workspace"
    shutil.copytree(original[0], folder)
    monkeypatch.chdir(folder)
    return folder


DEMO_ENGINE = ("engine.kind=deepspeed", "engine.zero_stage=1", "stages.teacher_t2i.steps=12",
               "stages.student.steps=12")  # fmt: skip
"""The engine of the demo, and enough steps for a process to be killed in the middle of them."""


@pytest.fixture(scope="session")
def deepspeed_arguments() -> tuple[str, ...]:
    return ("run", "tiny.yaml", *DEMO_ENGINE)


@pytest.fixture(scope="session")
def deepspeed_run(
    tmp_path_factory: pytest.TempPathFactory, velatura: Run, deepspeed_arguments: tuple[str, ...]
) -> Path:
    """The run folder of the tiny recipe under DeepSpeed, left alone from beginning to end."""
    folder = tmp_path_factory.mktemp("deepspeed")
    shutil.copy(TINY, folder / "tiny.yaml")
    velatura(*deepspeed_arguments, cwd=folder)
    return folder / "runs" / "tiny"


class Forks:
    """Starts runs in processes that have everything imported already: a tenth of a second each."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        self._server = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def start(
        self, *argv: object, cwd: Path, faults: Sequence[Mapping[str, Any]] = (),
        rank: tuple[int, int, int] | None = None, says: str = "says.txt",
    ) -> int:  # fmt: skip
        """Begin `velatura ARGV`, or `stage RECIPE NAME`; the id of its process. `rank`: number, size, port."""
        environment = {}
        if rank is not None:
            number, size, port = rank
            environment = {
                "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        order = {
            "do": "fork", "argv": [str(a) for a in argv], "cwd": str(cwd), "says": str(cwd / says),
            "environment": {name: str(value) for name, value in environment.items()}, "faults": list(faults),
        }  # fmt: skip
        return int(self._ask(order)["pid"])

    def wait(self, *pids: int, seconds: float = 240) -> list[int | None]:
        """Exit statuses, negative for a signal, None for what still runs after `seconds`."""
        found = self._ask({"do": "wait", "pids": list(pids), "seconds": seconds})
        return [found[str(pid)] for pid in pids]

    def run(self, *argv: object, cwd: Path, faults: Sequence[Mapping[str, Any]] = ()) -> int | None:
        """Begin and wait."""
        return self.wait(self.start(*argv, cwd=cwd, faults=faults))[0]

    def close(self) -> None:
        """End the server; what it has started ends by itself."""
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.stdout.close()  # type: ignore[union-attr]
        self._server.kill()
        self._server.wait()

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self._server.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
        self._server.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._server.stdout.readline()  # type: ignore[union-attr]
        assert line, "the fork server ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """One server for all tests of a worker."""
    server = Forks()
    yield server
    server.close()
