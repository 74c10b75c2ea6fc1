"""What is renamed goes on to work until a named release; a plugin for another release is told so."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from pydantic import Field, ValidationError

from velatura.core import __version__
from velatura.core.base_settings import Ref
from velatura.core.build import build
from velatura.core.cli import main
from velatura.core.components import Options, TimestepSampler
from velatura.core.deprecation import Renamed, VelaturaDeprecation, has_ended, mismatch, release
from velatura.core.errors import PluginError, RecipeError
from velatura.core.hookspecs import hookimpl
from velatura.core.plugin import Origin
from velatura.core.registry import Registry

Install = Callable[..., None]


class FewOptions(Options):
    """Options of `few`."""

    renamed = (Renamed(old="number", new="count", until="0.4"),)
    count: int = Field(8, ge=1, description="How many.")


class Few(TimestepSampler[FewOptions]):
    """A few steps."""

    name = "few"

    def plan(self, t: Any, generator: Any) -> Any:
        raise NotImplementedError


@hookimpl
def velatura_timesteps() -> Sequence[Any]:
    return [Few, Renamed(old="some", new="few", until="0.3")]


def registry_of(version: str = "0.2", hook: Any = velatura_timesteps) -> Registry:
    registry = Registry.empty()
    origin = Origin(plugin="acme", distribution="velatura-acme", version=version)
    registry._importers[origin] = lambda: types.SimpleNamespace(velatura_timesteps=hook)
    return registry


def test_a_component_is_found_by_its_old_name_and_says_until_when() -> None:
    with pytest.warns(VelaturaDeprecation) as said:
        assert registry_of().get("timesteps", "acme/some", "recipe.yaml:3: timesteps") is Few
    assert str(said[0].message) == (
        "recipe.yaml:3: timesteps: timesteps 'acme/some' is called 'acme/few' now; the old name ends with "
        "velatura-acme 0.3. Write 'acme/few'."
    )


@pytest.mark.parametrize("version", ["0.3", "0.3.1", "1.0"])
def test_from_that_release_on_the_old_name_is_an_error(version: str) -> None:
    with pytest.raises(RecipeError, match=r"is called 'acme/few' since velatura-acme 0\.3\. Write 'acme/few'\."):
        registry_of(version).get("timesteps", "acme/some")


def test_an_old_name_is_neither_listed_nor_suggested() -> None:
    registry = registry_of()
    assert [info.name for info in registry.list()] == ["acme/few"]
    assert [info.name for info in registry.components_of("acme")] == ["acme/few"]
    with pytest.raises(RecipeError, match=r"no timesteps is called 'acme/sone'\. Did you mean 'acme/few'"):
        registry.get("timesteps", "acme/sone")


def test_an_old_name_for_nothing_is_the_fault_of_the_plugin() -> None:
    @hookimpl
    def velatura_timesteps() -> Sequence[Any]:
        return [Renamed(old="some", new="few", until="0.3")]

    with pytest.raises(PluginError, match="said to be called 'few' now, which the plugin does not offer"):
        registry_of(hook=velatura_timesteps).get("timesteps", "acme/some")


def test_an_option_is_taken_by_its_old_name() -> None:
    ref = Ref.model_validate({"use": "acme/few", "with": {"number": 3}})
    with pytest.warns(VelaturaDeprecation) as said:
        made = build(registry_of(), "timesteps", ref, "recipe.yaml:3: timesteps")
    assert made.options.count == 3
    assert str(said[0].message) == (
        "recipe.yaml:3: timesteps: 'acme/few': option 'number' is called 'count' now; the old name ends with release "
        "0.4. Write 'count'."
    )


def test_both_names_of_an_option_are_one_too_many() -> None:
    ref = Ref.model_validate({"use": "acme/few", "with": {"number": 3, "count": 4}})
    with pytest.raises(RecipeError, match="'number' is the old name of 'count', and both are given"):
        build(registry_of(), "timesteps", ref)
    with pytest.raises(ValidationError, match="Extra inputs"), pytest.warns(VelaturaDeprecation):
        FewOptions.model_validate({"number": 3, "cuont": 1})


def test_releases_are_compared_as_numbers() -> None:
    assert release("0.10.2rc1") == (0, 10, 2)
    assert has_ended("0.9", "0.10")
    assert not has_ended("0.10", "0.9.5")
    assert not has_ended("0.3", "")


RENAMES = """
from velatura.api import NoOptions, Renamed, StepPlan, TimestepSampler, hookimpl

class Few(TimestepSampler[NoOptions]):
    name = "few"
    def plan(self, t, generator): ...

@hookimpl
def velatura_timesteps():
    return [Few, Renamed(old="some", new="few", until="0.3")]
"""


def test_the_command_line_says_it_in_a_line_and_goes_on(
    pipeline: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(RENAMES)
    main(["check", pipeline, "plugins=[mine.py]", "stages.teacher.timesteps=mine/some"])
    err = capsys.readouterr().err.splitlines()
    (line,) = [line for line in err if "deprecated" in line]
    assert line.startswith("velatura: deprecated: command line: stages.teacher.timesteps: timesteps 'mine/some' is")
    assert line.endswith("Write 'mine/few'.")


@pytest.mark.parametrize(
    ("requires", "said"),
    [
        ("velatura>=0.9,<1", "which is newer than this velatura {}. Upgrade velatura, or install a release of it that"),
        ("velatura (==9.*)", "which is newer than this velatura {}"),
        ("velatura[ocr]<0.1", "which is older than this velatura {}. Upgrade the plugin, or install a release of it"),
        ("velatura<0.0.9; python_version > '3'", "which is older"),
    ],
)
def test_a_plugin_for_another_release_is_told_so(
    requires: str, said: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", "raise RuntimeError", distribution="velatura-acme", module="acme_other", requires=requires)
    with pytest.raises(PluginError) as caught:
        Registry.discover().get("reward", "acme/redness")
    assert "plugin 'acme' (from velatura-acme 0.1) is made for velatura " in str(caught.value)
    assert said.format(__version__) in str(caught.value)
    assert main(["plugins", "list"]) == 0
    assert said.format(__version__) in capsys.readouterr().out


def test_a_plugin_for_this_release_is_let_in() -> None:
    major, minor = __version__.split(".")[:2]
    assert mismatch(f">={major}.{minor},<{major}.{int(minor) + 1}") == ""
    assert mismatch("") == ""
    assert mismatch("one of them").startswith("asks for velatura 'one of them', which is no range")


def test_no_name_of_ours_is_kept_longer_than_it_was_said() -> None:
    """Whoever raises the version removes what ends with it."""
    registry = Registry.discover()
    registry.list()
    renamed = [offer.renamed for offers in registry._offers.values() for offer in offers if offer.renamed]
    assert [change for change in renamed if has_ended(change.until, __version__)] == []
