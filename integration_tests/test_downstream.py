"""Packages of other people, installed beside the working tree: their own tests pass, and a run trains with them."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from velatura.core.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PACKAGES = sorted((ROOT / "examples").glob("velatura-*"))
PORTIONS = [str(ROOT / portion) for portion in ("core", "plugins", "rewards", "schedulers")]
LIMIT = 500  # seconds for a command; they take about ten


def run(*command: object, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a virtual environment in which both packages are installed from their wheels.

    All else it has from this one, and Velatura from the working tree.
    """
    folder = tmp_path_factory.mktemp("downstream")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "heavy.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", *PACKAGES, cwd=folder)
    return python


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """That of somebody who works with both; options of this pytest are none of theirs."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**outside, "PYTHONPATH": ":".join(PORTIONS), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_they_import_nothing_of_velatura_but_the_public_surface(package: Path) -> None:
    modules = set()
    for path in package.glob("velatura_*/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules.add(node.module)
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
    assert "velatura.api" in modules
    assert [name for name in modules if name.startswith("velatura.") and name != "velatura.api"] == []


def test_their_own_suites_pass(python: Path, environment: Mapping[str, str], tmp_path: Path) -> None:
    flags = ["-p", "no:cacheprovider", "-q", "-W", "error", "--import-mode=importlib", "-c", os.devnull]
    tests = [package / "tests" for package in PACKAGES]
    said = run(python, "-m", "pytest", *flags, *tests, cwd=tmp_path, environment=environment)
    (passed,) = re.findall(r"(\d+) passed", said)
    assert int(passed) > 50
    assert "failed" not in said


def test_their_components_are_listed_and_keep_their_contracts(
    python: Path, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """Both plugins in one process: importing torch takes longer than checking."""
    code = "import sys; from velatura.core.cli import main; sys.exit(any([main(c.split()) for c in sys.argv[1:]]))"
    verbs = ("plugins list", "plugins check palette", "plugins check matching", "plugins show palette/keeps-to")
    said = run(python, "-c", code, *verbs, cwd=tmp_path, environment=environment)
    listed = [line.split()[:2] for line in said.splitlines() if "velatura-palette" in line or "velatura-match" in line]
    for row in (["reward", "palette/keeps-to"], ["evaluator", "palette/colour"], ["objective", "matching/ram"],
                ["timesteps", "matching/mode"]):  # fmt: skip
        assert row in listed
    assert said.count(" passed\n") + said.count(" passed,") == 2
    assert " failed" not in said.replace("   failed", "")
    assert "Part of the picture that a colour has to cover" in said


def test_the_embedded_world_trains_with_both(python: Path, environment: Mapping[str, str], tmp_path: Path) -> None:
    """Two steps and a comparison, by the recipe of one with the components of the other."""
    recipe = ROOT / "examples" / "velatura-palette" / "recipes" / "palette.yaml"
    small = ["steps=2", "prompts_per_step=4", "group_size=4", "objective=matching/ram", "timesteps=matching/mode",
             "timesteps.with.count=2", "task.with.count=8", "task.with.eval_count=4"]  # fmt: skip
    changes = [f"stages.painter.{change}" for change in small]
    more = ["sampling.steps=4", "stages.compare.seeds_per_prompt=1", "stages.compare.bootstrap=20"]
    command = [python, "-m", "velatura.core.cli", "run", recipe, *changes, *more, "output=out"]
    run(*command, cwd=tmp_path, environment=environment)
    lines = (tmp_path / "out" / "painter" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == 2
    for step in steps:
        assert step["updated"] == 1
        assert step["grad_norm"] > 0
        assert 0 < step["reward/palette/keeps-to/mean"] < 1
    assert any("target_shift" in name for name in step)
    summary = (tmp_path / "out" / "compare" / "summary.json").read_text()
    assert "colourfulness" in summary


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_their_recipes_are_read_without_them_and_name_them(package: Path) -> None:
    plugin = package.name.removeprefix("velatura-")
    (path,) = package.glob("recipes/*.yaml")
    used = [ref.use for _, _, ref in load_recipe(path).references()]
    assert any(name.startswith(f"{plugin}/") for name in used)


def test_what_they_need_is_declared_for_the_tests_of_this_project() -> None:
    """Otherwise the suite above would only run on the machine on which it was written."""
    import tomllib

    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    declared = {re.split(r"[<>=~\[ ]", line)[0] for line in dev}
    for package in PACKAGES:
        for line in tomllib.loads((package / "pyproject.toml").read_text())["project"]["dependencies"]:
            name = re.split(r"[<>=~\[ ]", line)[0]
            assert name == "velatura" or name in declared
            assert importlib.metadata.version(name)
