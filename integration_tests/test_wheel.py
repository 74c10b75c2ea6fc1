"""The wheel, installed where the source tree is out of sight, runs the recipe of the demo."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "plugins" / "velatura" / "plugins" / "tinyworld" / "base.safetensors"
SMALL = [
    "engine.threads=1",
    "sampling.steps=2",
    *(f"stages.{name}.task.with.{key}=6" for name in ("curate_t2i", "curate_edit") for key in ("count", "eval_count")),
    *(f"stages.{name}.group_size=2" for name in ("curate_t2i", "curate_edit", "teacher_t2i", "teacher_edit")),
    *(f"stages.{name}.steps=1" for name in ("teacher_t2i", "teacher_edit", "student")),
    *(f"stages.{name}.prompts_per_step=2" for name in ("teacher_t2i", "teacher_edit", "student")),
    "stages.student.probe_prompts=2",
    *(f"stages.compare.tasks.{route}.with.eval_count=6" for route in ("t2i", "edit")),
    "stages.curate_edit.prompt_filter.with.threshold=0",
    "stages.compare.bootstrap=20",
    "stages.compare.seeds_per_prompt=1",
]
"""What makes the demo's recipe a matter of seconds."""


def run(*command: object, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []  # else pip fetches it
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *here, "-w", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, whose other packages are those of this one; it costs seconds.

    A path in a `.pth` file is searched for modules, but `.pth` files in it are not read: the editable installation
    that they stand for does not come along.
    """
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "heavy.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--no-deps", "--ignore-installed", "--no-index", wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def outside() -> dict[str, str]:
    """The environment of somebody who has no source tree."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"OMP_NUM_THREADS": "1"}


def test_the_wheel_is_what_is_imported(installed: Path, outside: dict[str, str], tmp_path: Path) -> None:
    code = "import velatura.core, velatura.plugins, velatura.rewards, velatura.schedulers, velatura.api, sys, json;"
    code += "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.startswith('velatura.')]))"
    files = json.loads(run(installed / "bin" / "python", "-c", code, cwd=tmp_path, environment=outside))
    assert files
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_the_base_checkpoint_ships(wheel: Path) -> None:
    """The demo starts from it; without it there would be nothing to improve."""
    with zipfile.ZipFile(wheel) as files:
        shipped = files.read(str(SHIPPED.relative_to(ROOT / "plugins")))
    assert shipped == SHIPPED.read_bytes()
    assert len(shipped) > 1_000_000


def test_the_weights_for_faces_ship_with_their_notice(wheel: Path) -> None:
    folder = ROOT / "rewards" / "velatura" / "rewards" / "faces"
    with zipfile.ZipFile(wheel) as files:
        for name in ("detection.safetensors", "recognition.safetensors", "NOTICE.md"):
            assert files.read(f"velatura/rewards/faces/{name}") == (folder / name).read_bytes()
        assert any(name.endswith("licenses/THIRD_PARTY_NOTICES.md") for name in files.namelist())


def test_recipes_ship_with_their_prompts_and_pictures(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        shipped = {name.removeprefix("velatura/") for name in files.namelist() if name.startswith("velatura/recipes/")}
    assert shipped == {str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*") if p.is_file()}


def test_every_component_is_found(installed: Path, outside: dict[str, str], tmp_path: Path) -> None:
    text = run(installed / "bin" / "velatura", "plugins", "list", cwd=tmp_path, environment=outside)
    names = ("tinyworld", "nft", "awm", "rollout-only", "high-noise", "velocity-match", "group-z", "tinyworld-gold")
    assert all(f" {name} " in text for name in names)
    assert "broken" not in text
    assert "no module" not in text


def test_the_demo_runs_from_the_wheel(installed: Path, outside: dict[str, str], tmp_path: Path) -> None:
    """The recipe is in the wheel, and is called by its name; nothing else is at hand."""
    text = run(installed / "bin" / "velatura", "run", "tinyworld", *SMALL, cwd=tmp_path, environment=outside)
    folder = tmp_path / "runs" / "tinyworld"
    assert "runs/tinyworld/report.html" in text
    assert (folder / "report.html").stat().st_size > 10_000
    trained = load_file(folder / "student" / "weights.safetensors")
    exported = load_file(folder / "export" / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert trained.keys() == exported.keys()
