from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from velatura.core.cli import main
from velatura.core.cli.program import VERBS

Write = Callable[..., str]
Install = Callable[..., None]
Capture = pytest.CaptureFixture[str]


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """What a verb calls, replaced: the verbs are tested here, not the pipeline."""
    replacement = types.ModuleType(module)
    for name, function in functions.items():
        setattr(replacement, name, function)
    monkeypatch.setitem(sys.modules, module, replacement)
    if module == "velatura.core.pipeline":
        stand_in(monkeypatch, "velatura.core.closing", close=lambda folder, console: None)


@pytest.mark.parametrize("verb", [*VERBS, "plugins list", "plugins show", "plugins check"])
def test_every_verb_explains_itself_with_an_example(verb: str, capsys: Capture) -> None:
    assert main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: velatura {verb}")
    assert verb == "plugins" or f"example:\n  velatura {verb}" in text


def test_without_arguments_the_help_is_shown(capsys: Capture) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert set(VERBS) <= {line.split()[0] for line in text.splitlines() if line.startswith("    ")}


def test_a_misspelt_command(capsys: Capture) -> None:
    assert main(["rnu"]) == 2
    assert capsys.readouterr().err == "velatura: there is no command 'rnu'. Did you mean 'run'?\n"
    assert main(["recipes/tinyworld.yaml"]) == 2
    assert capsys.readouterr().err == (
        "velatura: there is no command 'recipes/tinyworld.yaml'. To run a recipe: velatura run recipes/tinyworld.yaml\n"
    )


def test_an_unknown_option(pipeline: str, capsys: Capture) -> None:
    assert main(["run", pipeline, "--quick"]) == 2
    assert capsys.readouterr().err == "velatura: 'velatura run' does not take '--quick'; see velatura run --help\n"
    assert main(["report", pipeline, "a=b"]) == 2
    assert capsys.readouterr().err == "velatura: 'velatura report' does not take 'a=b'; see velatura report --help\n"


def test_a_user_error_is_one_message_and_status_2(pipeline: str, capsys: Capture) -> None:
    assert main(["check", pipeline, "sead=1"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "velatura: command line: sead: no such key. Did you mean 'seed'?\n")
    assert main(["run", "recipe.yml"]) == 2
    assert capsys.readouterr().err == "velatura: there is no recipe 'recipe.yml'. Did you mean 'recipe.yaml'?\n"


def test_run_hands_on_what_it_was_given(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def run_pipeline(recipe: object, overrides: list[str], *, only: str, fresh: bool, console: object) -> str:
        calls.append((str(recipe), overrides, only, fresh))
        return "folder"

    stand_in(monkeypatch, "velatura.core.pipeline", run_pipeline=run_pipeline)
    stand_in(monkeypatch, "velatura.core.closing", close=lambda folder, console: calls.append(folder))
    arguments = [pipeline, "seed=1", "--stage", "teacher", "stages.teacher.steps=2", "--fresh"]
    assert main(["run", *arguments]) == 0
    overrides = ["seed=1", "stages.teacher.steps=2"]
    assert calls == [(pipeline, overrides, "teacher", True), "folder"]


def test_an_unknown_stage_is_refused_before_anything_runs(pipeline: str, capsys: Capture) -> None:
    assert main(["run", pipeline, "--stage", "techer"]) == 2
    assert capsys.readouterr().err == "velatura: no stage is called 'techer'. Did you mean 'teacher'?\n"


def test_ctrl_c_is_one_line_and_status_130(pipeline: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def run_pipeline(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    stand_in(monkeypatch, "velatura.core.pipeline", run_pipeline=run_pipeline)
    assert main(["run", pipeline]) == 130
    err = capsys.readouterr().err
    assert err == "velatura: interrupted; the same command goes on from the last checkpoint\n"


def test_a_mistake_of_ours_is_a_traceback(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_pipeline(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    stand_in(monkeypatch, "velatura.core.pipeline", run_pipeline=run_pipeline)
    with pytest.raises(ZeroDivisionError):
        main(["run", pipeline])


def test_a_missing_file_is_a_user_error(pipeline: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def run_pipeline(*_: Any, **__: Any) -> None:
        open("gone.safetensors")  # noqa: PTH123, SIM115

    stand_in(monkeypatch, "velatura.core.pipeline", run_pipeline=run_pipeline)
    assert main(["run", pipeline]) == 2
    assert capsys.readouterr().err == "velatura: there is no file 'gone.safetensors'\n"


def test_plugins_list_shows_what_there_is_and_what_is_broken(install: Install, capsys: Capture) -> None:
    install("broken", "import paddleocr\n", distribution="velatura-broken", module="velatura_broken_listed")
    assert main(["plugins", "list"]) == 0
    text = capsys.readouterr().out
    assert "high-noise" in text
    assert "`count` steps without replacement, step k drawn in" in text
    assert "broken: plugin 'broken' (from velatura-broken 0.1) does not import: ModuleNotFoundError(" in text


def test_plugins_list_of_one_kind(capsys: Capture) -> None:
    assert main(["plugins", "list", "--kind", "kernel"]) == 0
    text = capsys.readouterr().out
    assert "ode" in text
    assert "high-noise" not in text
    assert main(["plugins", "list", "--kind", "kernle"]) == 2
    assert capsys.readouterr().err == "velatura: no kind is called 'kernle'. Did you mean 'kernel'?\n"


MINE = """\
from typing import Literal
from pydantic import Field
from velatura.core.components import Options, RewardModel
from velatura.core.hookspecs import hookimpl

class MineOptions(Options):
    weights: str = Field(description="Where the weights are.")
    size: int | None = Field(None, ge=1, le=9, description="How big.")
    mode: Literal["fast", "good"] = Field("good", description="How.")

class Mine(RewardModel[MineOptions]):
    '''Likes what I like.

    And nothing else.
    '''
    name = "mine"
    def score(self, samples): ...

@hookimpl
def velatura_reward():
    return [Mine]
"""


def test_plugins_show_describes_a_component_and_its_options(write: Write, capsys: Capture) -> None:
    assert main(["plugins", "show", "likes/mine", "--file", write(MINE, "likes.py")]) == 0
    text = capsys.readouterr().out
    assert "reward likes/mine\n" in text
    assert "likes.py\n" in text
    assert "Likes what I like.\n\nAnd nothing else.\n" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["weights", "str", "(required)", "Where", "the", "weights", "are."] in rows
    assert ["size", "int", ">=", "1,", "<=", "9", "|", "null", "null", "How", "big."] in rows
    assert ["mode", "fast", "|", "good", "good", "How."] in rows
    assert text.endswith("rewards:\n- use: likes/mine\n  with: {weights: <str>, size: null, mode: good}\n\n")


def test_plugins_show_of_something_unknown(write: Write, capsys: Capture) -> None:
    assert main(["plugins", "show", "hgih-noise"]) == 2
    err = capsys.readouterr().err
    assert err == "velatura: no component is called 'hgih-noise'. Did you mean 'high-noise'?\n"
    assert main(["plugins", "show", "sad/mine", "--file", write("import nowhere_x\n", "sad.py")]) == 2
    assert "does not import, line 1: ModuleNotFoundError" in capsys.readouterr().err


def test_the_schema_is_printed_as_json(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"
