"""`velatura plugins check`, and the decorator, on plugins from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from velatura.api import Prompt, Sample
from velatura.core.cli import main
from velatura.core.errors import PluginError, RecipeError
from velatura.core.registry import Registry
from velatura.testing import NotChecked, Trial, make_samples, plugin_checks

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

LEARNED = """
import torch
from pydantic import Field
from velatura.api import Options, RewardModel, Scores, hookimpl

class LearnedOptions(Options):
    path: str = Field(description="Its weight.")

class Learned(RewardModel[LearnedOptions]):
    '''Weighted brightness of foxes.'''

    name = "learned"
    shown = []

    def setup(self, context):
        self.weight = float(context.resolve(self.options.path).read_text())

    def applies(self, prompt):
        return prompt.category == "foxes"

    def score(self, samples):
        self.shown.extend(samples)
        return Scores.of(torch.stack([self.weight * s.image.mean() for s in samples]))

@hookimpl
def velatura_reward():
    return [Learned]
"""
TRIED = """
import pytest
from velatura.api import Prompt
from velatura.core.registry import Registry
from velatura.testing import Trial, parametrize_with_checks

registry = Registry.empty()
registry.add_file("{file}")

@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "weight.txt"
    path.write_text("2")
    return path

@parametrize_with_checks("acme_learned", registry=registry)
def test_learned(check, weights):
    foxes = [Prompt(id=str(i), text="a fox", task="t2i", category="foxes") for i in range(2)]
    trials = {{"acme_learned/learned": Trial(options={{"path": str(weights)}}, prompts=foxes)}}
    check(trials.get(check.component))
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


@pytest.mark.parametrize("slow", ["diffusers", "torch"])
def test_importing_what_is_slow_is_found(slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: what this one has imported says nothing."""
    from velatura.testing.conformance import _importing_it_is_quick

    (tmp_path / f"{slow}.py").write_text("")
    (tmp_path / "acme_slow.py").write_text(f"import {slow}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AssertionError, match=f"importing acme_slow imports {slow};"):
        _importing_it_is_quick("acme_slow")


def test_a_pytest_without_configuration_has_one_id_per_component_and_check(good: Path) -> None:
    """A fixture gives weights to what needs them."""
    test, tried, learned = (good.with_name(name) for name in ("test_acme.py", "test_tried.py", "acme_learned.py"))
    test.write_text(textwrap.dedent(TEST.format(file=good, name="acme_good")))
    learned.write_text(LEARNED)
    tried.write_text(TRIED.format(file=learned))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-W", "error", str(test), str(tried)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=good.parent, timeout=120, env=plain)
    assert done.returncode == 0, done.stdout
    assert "test_conformance[acme_good/redness-score_does_not_depend_on_the_batch] PASSED" in done.stdout
    assert "test_conformance[acme_good/redness-options_survive_a_round_trip] SKIPPED" in done.stdout
    made = [line for line in done.stdout.splitlines() if "test_learned[acme_learned/learned-" in line]
    assert len(made) == 12
    assert all("PASSED" in line for line in made)


@pytest.fixture
def learned(tmp_path: Path) -> tuple[Registry, Path]:
    """A reward that needs a weight and judges foxes alone, and its weight."""
    path, weight = tmp_path / "acme_learned.py", tmp_path / "weight.txt"
    path.write_text(LEARNED)
    weight.write_text("2")
    registry = Registry.empty()
    registry.add_file(path)
    return registry, weight


def test_what_is_tried_without_its_options_or_pictures_says_how_to_give_them(learned: tuple[Registry, Path]) -> None:
    registry, weight = learned
    check = next(c for c in plugin_checks("acme_learned", registry=registry) if c.name == "one_score_per_sample")
    with pytest.raises(NotChecked, match=r"path: Field required.*`example\(\)`, or the check options: `check\(Trial\("):
        check()
    with pytest.raises(NotChecked, match="it applies to no prompt tried"):
        check(Trial(options={"path": str(weight)}))
    with pytest.raises(RecipeError, match=r"options of 'learned' are wrong:\n  .*Did you mean 'path'"):
        check(Trial(options={"pth": str(weight)}))
    with pytest.raises(FileNotFoundError):  # what is given has to work: it is no reason to skip
        check(Trial(options={"path": str(weight.with_name("none"))}))


def test_a_check_looks_at_the_pictures_that_it_is_given(learned: tuple[Registry, Path]) -> None:
    registry, weight = learned
    fox = Prompt(id="p", text="a fox", task="t2i", category="foxes")
    given: list[Sample] = make_samples([fox], per_prompt=2)
    shown = registry.get("reward", "acme_learned/learned").shown  # type: ignore[attr-defined]
    for check in plugin_checks("acme_learned", registry=registry, prompts=[Prompt(id="o", text="an owl", task="t2i")]):
        if check.kind:
            shown.clear()
            check(Trial(options={"path": str(weight)}, samples=given))
            assert all(sample.prompt is fox for sample in shown)
            if check.name == "score_does_not_depend_on_the_order":
                assert [any(s is sample for s in shown) for sample in given] == [True, True]
