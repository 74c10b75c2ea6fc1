"""The made-up run, made once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_run", Path(__file__).with_name("synthetic_run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The functions that make run folders."""
    return _load()


@pytest.fixture(scope="session")
def run_folder(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; do not change it."""
    folder: Path = synthetic.make_run(tmp_path_factory.mktemp("run") / "demo", prompts=30)
    return folder
