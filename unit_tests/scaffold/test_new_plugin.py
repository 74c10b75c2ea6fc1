"""What `velatura new-plugin` writes is a package: it installs, its tests pass, a recipe can use it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from velatura.api import Component
from velatura.core.cli import main
from velatura.core.contracts import CONTRACTS
from velatura.core.errors import VelaturaError
from velatura.core.registry import Registry
from velatura.core.scaffold import new_plugin
from velatura.testing.fixtures import TinyRun

pytest_plugins = ["velatura.testing.fixtures"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a component of every kind."""
    return new_plugin("acme", list(CONTRACTS), tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has built and installed it."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, str(package)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return target


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


def test_its_own_tests_pass_once_it_is_installed(package: Path, site: Path) -> None:
    path = [str(site), *(p for p in sys.path if p)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-W", "error", "tests"]
    environment = {"PYTHONPATH": ":".join(path), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=package, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout  # options of a component that has none


def test_an_installed_reward_and_objective_train(
    site: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Callable[..., TinyRun]
) -> None:
    monkeypatch.syspath_prepend(str(site))
    run = tiny_run(
        rewards=[{"use": "acme/redness", "with": {"gain": 2.0}}],
        objective={"use": "acme/pull"},
        timesteps={"use": "acme/window", "with": {"count": 2}},
        observers=[{"use": "acme/diary"}],
    )
    (step,) = run.metrics
    assert 0 < step["reward/acme/redness/mean"] < 2
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
