from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from pydantic import Field, model_validator

from velatura.core.build import build, open_registry, resolve_options
from velatura.core.components import Component, NoOptions, Options, TimestepSampler
from velatura.core.contracts import CONTRACTS
from velatura.core.errors import RecipeError, VelaturaError
from velatura.core.hookspecs import hookimpl
from velatura.core.recipe import Ref, load_recipe
from velatura.core.registry import Registry

Write = Callable[..., str]


class Band(Options):
    """Part of the options below."""

    low: float = Field(0.0, ge=0, description="Lower end.")
    high: float = Field(1.0, description="Upper end.")

    @model_validator(mode="after")
    def _ordered(self) -> Band:
        if self.low > self.high:
            raise ValueError("low lies above high")
        return self


class FewOptions(Options):
    """Options of `few`."""

    count: int = Field(8, ge=1, description="How many.")
    power: float = Field(2.0, ge=0, description="How strongly.")
    band: Band = Field(Band(), description="Where.")

    def model_post_init(self, context: object) -> None:
        if self.count == 13:
            raise VelaturaError("13 is unlucky")


class Few(TimestepSampler[FewOptions]):
    """A few steps."""

    name = "few"

    def plan(self, t: Any, generator: Any) -> Any:
        raise NotImplementedError


class Eager(TimestepSampler[NoOptions]):
    """Counts how often it is made."""

    name = "eager"

    def plan(self, t: Any, generator: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def registry() -> Registry:
    registry = Registry.empty()

    @hookimpl
    def velatura_timesteps() -> Sequence[type]:
        return [Few, Eager]

    registry.add(types.SimpleNamespace(velatura_timesteps=velatura_timesteps), "steps", builtin=True)
    return registry


def wrong(registry: Registry, ref: Ref, at: str = "timesteps") -> str:
    """What a user reads."""
    with pytest.raises(RecipeError) as caught:
        build(registry, "timesteps", ref, at)
    return str(caught.value)


def test_a_reference_becomes_a_component(registry: Registry) -> None:
    component = build(registry, "timesteps", Ref(use="few", with_={"count": 3, "band": {"low": 0.5}}))
    assert isinstance(component, Few)
    assert component.options == FewOptions(count=3, band=Band(low=0.5))


def test_wrong_options_are_listed_under_the_component(registry: Registry) -> None:
    assert wrong(registry, Ref(use="few", with_={"cuont": 3, "power": -1})) == (
        "timesteps: options of 'few' are wrong:\n"
        "  cuont: no such option. Did you mean 'count'?\n"
        "  power: give 0 or more (got -1)"
    )


def test_wrong_options_inside_options(registry: Registry) -> None:
    assert wrong(registry, Ref(use="few", with_={"band": {"hihg": 2}})) == (
        "timesteps: options of 'few' are wrong:\n  band.hihg: no such option. Did you mean 'high'?"
    )
    assert wrong(registry, Ref(use="few", with_={"band": {"low": 2}})) == (
        "timesteps: options of 'few' are wrong:\n  band: low lies above high"
    )


def test_options_for_a_component_without_any(registry: Registry) -> None:
    assert wrong(registry, Ref(use="eager", with_={"count": 1}), at="") == (
        "options of 'eager' are wrong:\n  count: no such option: there is none to set"
    )


def test_options_that_complain_in_their_own_words(registry: Registry) -> None:
    assert wrong(registry, Ref(use="few", with_={"count": 13})) == (
        "timesteps: options of 'few' are wrong:\n  13 is unlucky"
    )


PLUGIN = """\
from pydantic import Field
from velatura.core.components import *
from velatura.core.components import Component
from velatura.core.hookspecs import hookimpl
"""


def every_kind() -> str:
    """A plugin file with one component of every kind a supervised stage has."""
    source = PLUGIN
    for kind in ("adapter", "task", "objective", "observer"):
        contract = CONTRACTS[kind]
        methods = "".join(f"    def {m}(self, *a, **k): ...\n" for m in sorted(contract.__abstractmethods__))
        source += f"""
class {kind.title()}Options(Options):
    size: int = Field(4, ge=1, description="How big.")

class My{kind.title()}({contract.__name__}[{kind.title()}Options]):
    '''A {kind}.'''
    name = "my-{kind}"
{methods}
@hookimpl
def velatura_{kind}():
    return [My{kind.title()}]
"""
    return source


RECIPE = """\
plugins: [./mine.py]
adapter: my-adapter
stages:
  train:
    stage: supervised
    task: {use: my-task, with: {size: 9}}
    objective: mine/my-objective
    observers:
      - my-observer
"""


def test_resolving_fills_in_the_options_of_every_component(write: Write) -> None:
    write(every_kind(), "mine.py")
    recipe = load_recipe(write(RECIPE))
    stage = resolve_options(open_registry(recipe), recipe)["stages"]["train"]
    assert stage["adapter"] == {"use": "my-adapter", "with": {"size": 4}}
    assert stage["task"] == {"use": "my-task", "with": {"size": 9}}
    assert stage["observers"] == [{"use": "my-observer", "with": {"size": 4}}]


def test_all_that_is_wrong_is_said_at_once_and_in_place(write: Write) -> None:
    write(every_kind(), "mine.py")
    recipe = load_recipe(write(RECIPE), ["stages.train.task.with.size=0", "stages.train.objective=mine/my-objectvie"])
    with pytest.raises(RecipeError) as caught:
        resolve_options(open_registry(recipe), recipe)
    assert str(caught.value) == (
        "recipe.yaml:6: stages.train.task: options of 'my-task' are wrong:\n"
        "  size: give 1 or more (got 0)\n"
        "command line: stages.train.objective: no objective is called 'mine/my-objectvie'. "
        "Did you mean 'mine/my-objective'?"
    )


def test_a_plugin_file_that_is_not_there_names_the_line(write: Write) -> None:
    recipe = load_recipe(write(RECIPE.replace("mine.py", "gone.py")))
    with pytest.raises(VelaturaError) as caught:
        open_registry(recipe)
    assert str(caught.value).startswith("recipe.yaml:1: plugins.0: there is no plugin file '")


def test_plugin_files_are_seen_from_the_recipe(write: Write) -> None:
    write(every_kind(), "below/mine.py")
    recipe = load_recipe(write(RECIPE, "below/recipe.yaml"))
    assert issubclass(open_registry(recipe).get("adapter", "my-adapter"), Component)
