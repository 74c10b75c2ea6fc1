"""`velatura plugins check`, and the decorator, on plugins from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from velatura.core.cli import main
from velatura.core.errors import PluginError
from velatura.core.registry import Registry
from velatura.testing import plugin_checks

GOOD = '''
import torch
from velatura.api import NoOptions, RewardModel, Scores, hookimpl

class Redness(RewardModel[NoOptions]):
    """Share of red."""

    name = "redness"

    def score(self, samples):
        return Scores.of(torch.stack([s.image[0].mean() for s in samples]))

@hookimpl
def velatura_reward():
    return [Redness]
'''
BAD = GOOD.replace("torch.stack(", "torch.rand(1) + torch.stack(")
TEST = """
from velatura.core.registry import Registry
from velatura.testing import parametrize_with_checks

registry = Registry.empty()
registry.add_file("{file}")

@parametrize_with_checks("{name}", registry=registry)
def test_conformance(check):
    check()
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "acme_good.py"
    path.write_text(GOOD)
    return path


def test_a_table_and_status_0_when_everything_holds(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "acme_good", "--file", str(good)]) == 0
    out = capsys.readouterr().out
    assert "acme_good/redness" in out
    assert "failed: " not in out
    assert "not checked: acme_good/redness, options_survive_a_round_trip\n    it has no options" in out


def test_status_1_and_the_reason_when_something_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "acme_bad.py"
    path.write_text(BAD)
    assert main(["plugins", "check", "acme_bad", "--file", str(path), "--kind", "reward"]) == 1
    out = capsys.readouterr().out
    assert "failed: acme_bad/redness, score_does_not_depend_on_the_batch" in out
    assert "sample 0 has another score alone than among others" in out


def test_a_plugin_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "schedulerz"]) == 2
    assert capsys.readouterr().err == "velatura: no plugin 'schedulerz' is installed. Did you mean 'schedulers'?\n"


def test_a_kind_that_it_does_not_have(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "acme_good", "--file", str(good), "--kind", "kernel"]) == 2
    assert capsys.readouterr().err == "velatura: plugin 'acme_good' has no component of kind 'kernel'\n"


def test_a_plugin_that_offers_nothing(tmp_path: Path) -> None:
    (tmp_path / "acme_empty.py").write_text("")
    registry = Registry.empty()
    registry.add_file(tmp_path / "acme_empty.py")
    with pytest.raises(PluginError, match="offers no components; return them from a hook, like velatura_reward"):
        plugin_checks("acme_empty", registry=registry)


def test_importing_what_is_slow_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: what this one has imported says nothing."""
    from velatura.testing.conformance import _importing_it_is_quick

    (tmp_path / "diffusers.py").write_text("")
    (tmp_path / "acme_slow.py").write_text("import diffusers")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AssertionError, match="importing acme_slow imports diffusers"):
        _importing_it_is_quick("acme_slow")


def test_a_pytest_without_configuration_has_one_id_per_component_and_check(good: Path) -> None:
    test = good.with_name("test_acme.py")
    test.write_text(textwrap.dedent(TEST.format(file=good, name="acme_good")))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-W", "error", str(test)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=good.parent, timeout=120, env=plain)
    assert done.returncode == 0, done.stdout
    assert "test_conformance[acme_good/redness-score_does_not_depend_on_the_batch] PASSED" in done.stdout
    assert "test_conformance[acme_good/redness-options_survive_a_round_trip] SKIPPED" in done.stdout
