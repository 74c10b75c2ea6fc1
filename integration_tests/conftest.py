"""Runs of the tiny recipe, each done once a session by the real command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
            command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False, **options
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
