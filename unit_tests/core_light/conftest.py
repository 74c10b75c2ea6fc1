from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

PIPELINE = """\
seed: 3
adapter: tiny
rewards: [{use: good, weight: 2}]
sampling: {steps: 20}
stages:
  pick:
    stage: curate
    task: world
  teacher:
    stage: rl
    prompts: pick
    sampling: {batch: 32}
  student:
    stage: distill
    teachers: {t2i: teacher}
  compare:
    stage: evaluate
    models: [base, teacher, student]
    evaluators: [gold]
  out:
    stage: export
    model: student
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a file into an empty folder that is the current one; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str = PIPELINE, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write_file


@pytest.fixture
def pipeline(write: Callable[..., str]) -> str:
    """A recipe with one stage of every kind but `supervised`."""
    return write(PIPELINE)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a distribution with one entry point into this process: one module, one dist-info."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install_plugin(
        plugin: str, source: str, *, distribution: str, module: str, version: str = "0.1", requires: str = ""
    ) -> None:
        (site / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}")
        (info / "entry_points.txt").write_text(f"[velatura]\n{plugin} = {module}\n")

    return install_plugin
