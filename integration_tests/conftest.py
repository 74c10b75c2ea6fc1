"""Runs of the tiny recipe, each done once a session, and two ways to start `velatura`.

A process of its own takes seconds to import what it needs, most of the time of a small run. So tests of what a run does
fork one that has imported it; the console script starts where launching itself is what is tested.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from velatura.core.stages import showcase

COMMAND = Path(sys.executable).with_name("velatura")
TINY = Path(__file__).with_name("recipes") / "tiny.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> None:
    """Libraries ask for full collections of garbage, and those need not look at what stays: modules and tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def few_pictures() -> Iterator[None]:
    """Two pictures of a prompt in the grids that show how a model changes: most of a tiny run would draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showcase, "SEEDS", 2)
        yield


@pytest.fixture(scope="session")
def console_script() -> Run:
    """The `velatura` command as it is installed; it has to succeed unless `status` says otherwise."""

    def run(*arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(COMMAND), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
        )
        return ended(done, status)

    return run


def ended(done: subprocess.CompletedProcess[str], status: int) -> subprocess.CompletedProcess[str]:
    assert done.returncode == status, f"{done.args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def velatura(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The `velatura` command in a process that has everything imported already, or in `processes` of them without a
    launcher; it has to succeed unless `status` says otherwise."""
    folder, numbers = tmp_path_factory.mktemp("said"), itertools.count()

    def run(
        *arguments: object, cwd: Path, status: int = 0, processes: int = 1,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        number = next(numbers)
        out, err = folder / f"{number}.out", folder / f"{number}.err"
        pids = forks.start_all(*arguments, cwd=cwd, says=out, errors=err, environment=environment, processes=processes)
        statuses = set(forks.wait(*pids, seconds=900))
        said = subprocess.CompletedProcess(arguments, statuses.pop(), out.read_text(), err.read_text())
        assert not statuses, f"{arguments}: the processes ended in different ways\n{said.stdout}\n{said.stderr}"
        return ended(said, status)

    return run


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


Original = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, velatura: Run) -> Original:
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
        rank: tuple[int, int, int] | None = None, says: str | Path = "says.txt", errors: str | Path | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> int:  # fmt: skip
        """Begin `velatura ARGV`, `stage RECIPE NAME` or `script FILE ...`; the id of its process. `rank`: number, size,
        port. `says`, `errors`: files for stdout and stderr, one for both where there is no other."""
        variables: dict[str, object] = dict(environment)
        if rank is not None:
            number, size, port = rank
            variables |= {
                "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        order = {
            "do": "fork", "argv": [str(a) for a in argv], "cwd": str(cwd), "says": str(cwd / says),
            "errors": str(cwd / (errors or says)), "faults": list(faults),
            "environment": {name: str(value) for name, value in variables.items()},
        }  # fmt: skip
        return int(self._ask(order)["pid"])

    def start_all(self, *argv: object, cwd: Path, processes: int, **options: Any) -> list[int]:
        """Begin it in `processes` that share the work, as a launcher does."""
        port = free_port()
        ranks = [(number, processes, port) if processes > 1 else None for number in range(processes)]
        return [self.start(*argv, cwd=cwd, rank=rank, **options) for rank in ranks]

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
