"""What `velatura new-plugin` writes is a package: it installs, its tests pass, a recipe can use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import velatura
from velatura.api import Component
from velatura.core.cli import main
from velatura.core.contracts import CONTRACTS
from velatura.core.errors import VelaturaError
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry
from velatura.core.scaffold import new_plugin
from velatura.testing import NotChecked, plugin_checks
from velatura.testing.fixtures import TinyRun

pytest_plugins = ["velatura.testing.fixtures"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a component of every kind."""
    return new_plugin("umber", list(CONTRACTS), tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="module")
def python(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment into which pip has built and installed it; all else it has from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    done(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    others = "".join(f"{path}\n" for path in sys.path if path.endswith("site-packages"))
    (site_of(python) / "heavy.pth").write_text(others)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    done(sys.executable, "-m", "pip", "--python", python, "install", *options, package)
    return python


def done(*command: object, cwd: Path | None = None) -> str:
    """What a command says; it has to succeed. It imports Velatura from where this process does, and of this pytest it
    knows nothing."""
    portions = [str(Path(portion).parent) for portion in velatura.__path__]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**outside, "PYTHONPATH": ":".join(portions), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    ended = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True, cwd=cwd, env=environment,
        timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def site_of(python: Path) -> Path:
    """Where an environment keeps packages."""
    return next(python.parents[1].glob("lib/python3*/site-packages"))


@pytest.mark.parametrize("command", [["plugins", "list"], ["completion", "bash"]], ids=" ".join)
def test_what_needs_names_alone_imports_no_torch_for_a_package_that_is_installed(
    command: list[str], python: Path
) -> None:
    code = f"""if True:
        import sys
        from velatura.core.cli import main
        assert main({command}) == 0
        assert "velatura_umber" in sys.modules, "the package was not asked"
        assert "torch" not in sys.modules, "torch was imported"
    """
    done(python, "-c", code)


@pytest.mark.parametrize("kind", CONTRACTS)
def test_a_package_of_each_kind_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"only-{kind.replace('_', '-')}"
    folder = new_plugin(name, [kind], tmp_path)
    for path in folder.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
    entries = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]["velatura"]
    monkeypatch.syspath_prepend(str(folder))
    registry = Registry.empty()
    registry.add(EntryPoint(name, entries[name], "velatura").load(), name)
    (info,) = registry.list()
    component = registry.get(kind, info.name)
    assert (info.kind, info.problem) == (kind, "")
    assert issubclass(component, Component)
    assert f"`{info.name}`" in (folder / "README.md").read_text()
    for check in plugin_checks(name, registry=registry):
        with suppress(NotChecked):
            check()


def test_its_own_tests_pass_once_it_is_installed(package: Path, python: Path) -> None:
    assert next(site_of(python).glob("velatura_umber-*.dist-info")).is_dir()
    said = done(python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-W", "error", "tests", cwd=package)
    assert "1 skipped" in said  # options of a component that has none


EVERYTHING = """
plugins: []
output: out
engine: {kind: local, threads: 1, device: cpu}
adapter: {use: tinyworld, with: {weights: null, width: 48, layers: 2}}
sampling: {steps: 4}
guidance: {use: umber/interval}
kernel: {use: umber/churn}
stages:
  choose:
    stage: curate
    task: {use: tinyworld, with: {task: t2i, count: 6, eval_count: 4}}
    rewards: &rewards [{use: umber/redness}]
    prompt_filter: {use: umber/std, with: {least: 0.0}}
    group_size: 3
  teacher:
    stage: rl
    prompts: choose
    rewards: *rewards
    objective: {use: umber/pull}
    advantage: {use: umber/mean-margin}
    timesteps: {use: umber/window, with: {count: 2}}
    observers: [{use: umber/diary}]
    optimizer: {lr: 1.0e-2}
    steps: 1
    prompts_per_step: 2
    group_size: 3
  student:
    stage: distill
    teachers: {t2i: teacher}
    distiller: {use: umber/huber}
    kernel: ode
    steps: 1
    prompts_per_step: 2
    probe_prompts: 2
  rated:
    stage: rate
    task: {use: tinyworld, with: {task: t2i, count: 64}}
    group_size: 2
    raters: [{use: tinyworld-rater, dimension: cleanliness, with: {looks_at: cleanliness}}]
  judge:
    stage: judge-fit
    rated: rated
    dimension: cleanliness
    judge_model: {use: umber/colour-judge}
    steps: 2
    batch: 8
    validate_every: 2
  own:
    stage: rl
    adapter: {use: umber/pixels}
    task: {use: umber/colours}
    rewards: *rewards
    kernel: ode
    steps: 1
    prompts_per_step: 2
    group_size: 3
  compare:
    stage: evaluate
    models: [base, teacher, student]
    evaluators: [{use: umber/contrast}]
    kernel: ode
    tasks: {t2i: {use: tinyworld, with: {task: t2i, eval_count: 4}}}
    seeds_per_prompt: 1
    bootstrap: 20
"""
"""Every kind, each by a component of the package."""


def test_a_component_of_every_kind_is_used_in_a_run(python: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(EVERYTHING)
    used = {kind for _, kind, ref in load_recipe(recipe).references() if ref.use.startswith("umber/")}
    assert used == set(CONTRACTS)
    done(python, "-m", "velatura.core.cli", "run", recipe, cwd=tmp_path)
    out = tmp_path / "out"
    for stage in ("choose", "teacher", "student", "rated", "judge", "own", "compare"):
        assert json.loads((out / stage / "manifest.json").read_text())["status"] == "finished", stage
    for stage in ("teacher", "student", "own"):
        (line,) = (out / stage / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["grad_norm"] > 0, stage
    assert (out / "teacher" / "diary.jsonl").exists()
    assert (out / "judge" / "judge" / "judge.safetensors").exists()
    assert "contrast" in (out / "compare" / "summary.json").read_text()


def test_an_installed_reward_and_objective_train(
    python: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Callable[..., TinyRun]
) -> None:
    monkeypatch.syspath_prepend(str(site_of(python)))
    run = tiny_run(
        rewards=[{"use": "umber/redness", "with": {"gain": 2.0}}],
        objective={"use": "umber/pull"},
        timesteps={"use": "umber/window", "with": {"count": 2}},
        observers=[{"use": "umber/diary"}],
    )
    (step,) = run.metrics
    assert 0 < step["reward/umber/redness/mean"] < 2
    assert step["updated"] == 1
    assert (run.stage / "diary.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Acme", "--kind", "reward"], "a plugin cannot be called 'Acme': lower-case words joined by '-', like 'acme'. "
         "Did you mean 'acme'?"),
        (["a/b", "--kind", "reward"], "Did you mean 'a-b'?"),
        (["1", "--kind", "reward"], "a plugin cannot be called '1': lower-case words joined by '-', like 'acme'.\n"),
        (["velatura-acme", "--kind", "reward"], "the package is called velatura-NAME by itself"),
        (["acme", "--kind", "rewards"], "no kind is called 'rewards'. Did you mean 'reward'?"),
        (["acme", "--kind", "reward", "--into", "gone"], "there is no folder 'gone' to write the package into"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_no_file(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_writing_it_takes_less_than_a_second_and_imports_no_torch(tmp_path: Path) -> None:
    code = """
import sys, time
from velatura.core.cli import main
status = main(["new-plugin", "acme", "--kind", "reward", "--into", sys.argv[1]])
sys.exit(status or "torch" in sys.modules or time.process_time() > 1)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "velatura-acme" / "velatura_acme" / "reward.py").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "velatura-acme").mkdir()
    with pytest.raises(VelaturaError, match=r"velatura-acme exists\. Choose another name"):
        new_plugin("acme", ["reward"], tmp_path)
    assert list((tmp_path / "velatura-acme").iterdir()) == []
