from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from velatura.core.components import Kernel, NoOptions, RewardModel
from velatura.core.errors import PluginError, RecipeError, VelaturaError
from velatura.core.hookspecs import hookimpl
from velatura.core.registry import Registry

Write = Callable[..., str]
Install = Callable[..., None]

REDNESS = """\
from pydantic import Field
from velatura.core.components import Options, RewardModel
from velatura.core.hookspecs import hookimpl

class RednessOptions(Options):
    gain: float = Field(1.0, gt=0, description="Multiplies the score.")

class Redness(RewardModel[RednessOptions]):
    '''Share of red in the image's light.

    More words.
    '''

    name = "redness"

    def score(self, samples):
        raise NotImplementedError

@hookimpl
def velatura_reward():
    return [Redness]
"""


class Blueness(RewardModel[NoOptions]):
    """Share of blue."""

    name = "blueness"

    def score(self, samples: Sequence[Any]) -> Any:
        raise NotImplementedError


class Unfinished(RewardModel[NoOptions]):
    """Has no `score`."""

    name = "unfinished"


class Nameless(RewardModel[NoOptions]):
    """Has no name."""

    def score(self, samples: Sequence[Any]) -> Any:
        raise NotImplementedError


class Still(Kernel[NoOptions]):
    """Not a reward."""

    name = "still"

    def step(self, v: Any, x: Any, t: Any, t_next: Any) -> Any:
        raise NotImplementedError


def plugin(*rewards: object, hook: str = "velatura_reward") -> types.SimpleNamespace:
    """A plugin with one hook."""

    def answer() -> Sequence[object]:
        return list(rewards)

    return types.SimpleNamespace(**{hook: hookimpl(answer)})


def message(registry: Registry, name: str, kind: str = "reward", at: str = "") -> str:
    """What a user reads."""
    with pytest.raises(VelaturaError) as caught:
        registry.get(kind, name, at)
    return str(caught.value)


def test_built_ins_have_bare_names_and_others_carry_their_plugins_name() -> None:
    registry = Registry.empty()
    registry.add(plugin(Blueness), "colours", builtin=True)
    registry.add(plugin(Blueness), "acme")
    assert registry.get("reward", "blueness") is Blueness
    assert registry.get("reward", "acme/blueness") is Blueness
    assert [info.name for info in registry.list()] == ["blueness", "acme/blueness"]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    registry = Registry.empty()
    registry.add(plugin(Blueness), "acme")
    assert message(registry, "acme/bluness", at="rewards.1") == (
        "rewards.1: no reward is called 'acme/bluness'. Did you mean 'acme/blueness'?"
    )
    assert message(registry, "amce/blueness") == "no plugin 'amce' is installed. Did you mean 'acme'?"
    assert message(registry, "blueness") == "no reward is called 'blueness'. There is none."
    assert message(registry, "x", kind="rewards") == (
        "there is no kind of component called 'rewards'. Did you mean 'reward'?"
    )
    assert message(Registry.empty(), "acme/x", at="kernel", kind="kernel") == (
        "kernel: no plugin 'acme' is installed. Install the package that has it, or name its file under 'plugins' of "
        "the recipe."
    )


def test_an_installed_distribution_is_found(install: Install) -> None:
    install("acme", REDNESS, distribution="velatura-acme", module="velatura_acme_found")
    registry = Registry.discover()
    assert "velatura_acme_found" not in sys.modules  # nobody asked yet
    assert registry.get("reward", "acme/redness").__name__ == "Redness"
    info = registry.info("reward", "acme/redness")
    assert (info.plugin, info.distribution, info.version) == ("acme", "velatura-acme", "0.1")
    assert info.summary == "Share of red in the image's light."


def test_only_the_plugin_that_is_named_is_imported(install: Install) -> None:
    install("acme", REDNESS, distribution="velatura-acme", module="velatura_acme_named")
    install("other", REDNESS, distribution="velatura-other", module="velatura_other_named")
    registry = Registry.discover()
    registry.get("reward", "other/redness")
    registry.get("kernel", "ode")
    assert "velatura_acme_named" not in sys.modules
    assert "velatura_other_named" in sys.modules


def test_a_broken_plugin_leaves_the_others_usable(install: Install) -> None:
    install("broken", "import paddleocr\n", distribution="velatura-broken", module="velatura_broken_x", version="2.0")
    install("acme", REDNESS, distribution="velatura-acme", module="velatura_acme_beside")
    registry = Registry.discover()
    names = [info.name for info in registry.list()]
    assert "acme/redness" in names
    assert "nft" in names
    [broken] = registry.broken
    assert (broken.name, broken.distribution, broken.version) == ("broken", "velatura-broken", "2.0")
    assert isinstance(broken.error.__cause__, ModuleNotFoundError)
    assert message(registry, "broken/ocr") == (
        "plugin 'broken' (from velatura-broken 2.0) does not import: "
        "ModuleNotFoundError(\"No module named 'paddleocr'\"). Install what has it, or mend the import."
    )


def test_a_broken_built_in_leaves_the_others_usable() -> None:
    registry = Registry.empty()
    registry.add(plugin(None), "cracked", builtin=True)
    registry.add(plugin(Blueness), "sound", builtin=True)
    assert registry.get("reward", "blueness") is Blueness
    assert message(registry, "greenness").startswith("plugin 'cracked': velatura_reward returned None")


def test_a_plugin_that_exits_while_it_is_imported_is_broken_too(install: Install) -> None:
    install("rude", "raise SystemExit(3)\n", distribution="velatura-rude", module="velatura_rude")
    assert message(Registry.discover(), "rude/x") == (
        "plugin 'rude' (from velatura-rude 0.1) does not import: SystemExit('3')"
    )


def test_an_unknown_hook_is_answered_with_the_nearest() -> None:
    registry = Registry.empty()
    registry.add(plugin(Blueness, hook="velatura_rewards"), "acme")
    assert message(registry, "acme/blueness") == (
        "plugin 'acme' implements 'velatura_rewards', which this velatura does not have. "
        "Did you mean 'velatura_reward'?"
    )


def test_a_hook_without_its_mark() -> None:
    def velatura_reward() -> Sequence[object]:
        return [Blueness]

    registry = Registry.empty()
    registry.add(types.SimpleNamespace(velatura_reward=velatura_reward), "acme")
    assert message(registry, "acme/blueness") == (
        "plugin 'acme' defines 'velatura_reward' without @hookimpl; put it above the function"
    )


def test_a_hook_with_arguments() -> None:
    @hookimpl
    def velatura_reward(register: object) -> Sequence[object]:
        return [Blueness]

    registry = Registry.empty()
    registry.add(types.SimpleNamespace(velatura_reward=velatura_reward), "acme")
    assert message(registry, "acme/x").startswith("plugin 'acme' does not fit this velatura: PluginValidationError(")


def test_two_components_of_one_name() -> None:
    registry = Registry.empty()
    registry.add(plugin(Blueness), "warm", builtin=True)
    registry.add(plugin(Blueness), "cold", builtin=True)
    assert message(registry, "blueness", at="rewards.0") == (
        "rewards.0: two components of kind reward are called 'blueness': one of plugin 'warm' and plugin 'cold'"
    )


def test_two_distributions_with_a_plugin_of_one_name(install: Install) -> None:
    install("acme", REDNESS, distribution="velatura-acme", module="velatura_acme_one")
    install("acme", REDNESS, distribution="acme-tools", module="velatura_acme_two", version="7.1")
    registry = Registry.discover()
    assert message(registry, "acme/redness") == (
        "two plugins are called 'acme': from acme-tools 7.1 and from velatura-acme 0.1; "
        "rename one of the files, or uninstall one of the packages"
    )
    assert registry.get("kernel", "ode")


def test_a_plugin_named_like_a_built_in_one_stays_apart(install: Install) -> None:
    install("rewards", REDNESS, distribution="velatura-acme", module="velatura_acme_namesake")
    registry = Registry.discover()
    assert registry.get("reward", "rewards/redness").__name__ == "Redness"
    assert message(registry, "redness").startswith("no reward is called 'redness'.")


def test_a_name_in_a_string_is_imported_when_asked_for(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(REDNESS, "lazy_redness.py")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    registry = Registry.empty()
    registry.add(plugin("redness = lazy_redness:Redness", "gone = nowhere_to_be:Found"), "acme")
    infos = {info.name: info for info in registry.list()}
    assert infos["acme/redness"].summary == "Share of red in the image's light."
    assert infos["acme/redness"].problem == ""
    assert infos["acme/gone"].problem == "there is no module nowhere_to_be"
    assert "lazy_redness" not in sys.modules
    assert registry.get("reward", "acme/redness").__name__ == "Redness"
    assert message(registry, "acme/gone") == (
        "plugin 'acme': reward 'gone' does not import: ModuleNotFoundError(\"No module named 'nowhere_to_be'\")"
    )


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("redness: m.x", "velatura_reward names 'redness: m.x'; write 'name = package.module:Class'"),
        (
            3,
            "velatura_reward returned 3, which is not a component class; it should return a list of classes or of "
            "strings 'name = package.module:Class'",
        ),
        (Nameless, "velatura_reward returned class Nameless, which has no name; set name = '...' in it"),
        (Unfinished, "reward 'unfinished' lacks score. Write score(self, samples)."),
        (Still, f"reward 'still' is {Still!r}, which is not a subclass of RewardModel"),
        (f"x = {__name__}:X", f"reward 'x' is said to be {__name__}:X, but {__name__} has no 'X'"),
        (
            f"other = {__name__}:Blueness",
            "reward 'other' is a class whose name is 'blueness'; set name = 'other' in it",
        ),
    ],
)
def test_what_a_hook_may_not_return(item: object, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    registry = Registry.empty()
    registry.add(plugin(item), "acme")
    name = {Still: "still", Unfinished: "unfinished"}.get(item) if isinstance(item, type) else str(item).split(" ")[0]
    assert message(registry, f"acme/{name}") == f"plugin 'acme': {complaint}"


def _this_module() -> types.ModuleType:
    """These classes as a module that can be imported by name, however pytest loaded this file."""
    module = types.ModuleType(__name__)
    module.Blueness = Blueness  # type: ignore[attr-defined]
    return module


def test_a_hook_that_returns_no_list_or_raises() -> None:
    registry = Registry.empty()
    registry.add(types.SimpleNamespace(velatura_reward=hookimpl(lambda: None)), "none")
    registry.add(types.SimpleNamespace(velatura_reward=hookimpl(lambda: 1 / 0)), "zero")
    assert message(registry, "none/x") == (
        "plugin 'none': velatura_reward returned None; "
        "it should return a list of classes or of strings 'name = package.module:Class'"
    )
    assert message(registry, "zero/x") == "plugin 'zero': velatura_reward raised ZeroDivisionError('division by zero')"


def test_a_file_is_a_plugin(write: Write) -> None:
    registry = Registry.empty()
    registry.add_file(write(REDNESS, "my_reward.py"))
    registry.add_file("my_reward.py")  # twice is once
    assert registry.get("reward", "my_reward/redness") is registry.get("reward", "redness")
    assert message(registry, "my_reward/rednes") == (
        "no reward is called 'my_reward/rednes'. Did you mean 'my_reward/redness'?"
    )


def test_a_built_in_keeps_its_bare_name(write: Write) -> None:
    registry = Registry.empty()
    registry.add(plugin(Blueness), "colours", builtin=True)
    registry.add_file(write(REDNESS.replace('"redness"', '"blueness"'), "mine_blue.py"))
    assert registry.get("reward", "blueness") is Blueness
    assert registry.get("reward", "mine_blue/blueness").__name__ == "Redness"


def test_two_files_offering_one_name_must_be_told_apart(write: Write) -> None:
    registry = Registry.empty()
    one, two = Path(write(REDNESS, "one.py")).resolve(), Path(write(REDNESS, "two.py")).resolve()
    registry.add_file(one)
    registry.add_file(two)
    assert message(registry, "redness") == (
        "two components of kind reward are called 'redness': "
        f"one of plugin 'one' (from {one}) and plugin 'two' (from {two})"
    )
    assert registry.get("reward", "two/redness").name == "redness"


def test_two_files_of_one_name(write: Write) -> None:
    registry = Registry.empty()
    one, two = Path(write(REDNESS, "a/mine.py")).resolve(), Path(write(REDNESS, "b/mine.py")).resolve()
    registry.add_file(one)
    registry.add_file(two)
    assert message(registry, "mine/redness") == (
        f"two plugins are called 'mine': from {one} and from {two}; "
        "rename one of the files, or uninstall one of the packages"
    )


def test_a_file_that_does_not_import(write: Write) -> None:
    registry = Registry.empty()
    path = Path(write("def oops(:\n", "crooked.py")).resolve()
    registry.add_file(path)
    assert message(registry, "crooked/x") == (
        f"plugin 'crooked' (from {path}) does not import: SyntaxError('invalid syntax (crooked.py, line 1)')"
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        Registry.empty().add_file(tmp_path / "gone.py")
    assert str(caught.value) == f"there is no plugin file '{tmp_path / 'gone.py'}'."
    (tmp_path / "gonne.py").touch()
    with pytest.raises(PluginError, match=r"Did you mean 'gonne\.py'\?"):
        Registry.empty().add_file(tmp_path / "gone.py")


def test_components_of_a_file_can_be_pickled(write: Write) -> None:
    import pickle

    registry = Registry.empty()
    registry.add_file(write(REDNESS, "picklable.py"))
    component = registry.get("reward", "redness")()
    assert pickle.loads(pickle.dumps(component)).options == component.options


def test_an_empty_registry_knows_nothing_of_what_is_installed() -> None:
    assert list(Registry.empty().list()) == []
    with pytest.raises(RecipeError):
        Registry.empty().get("kernel", "ode")


def test_every_built_in_is_what_its_plugin_says() -> None:
    """In a process of its own, because it imports everything."""
    code = """
from velatura.core.registry import Registry
registry = Registry.discover()
for info in registry.list():
    if info.distribution == "velatura":
        assert not info.problem, info
        assert info.summary, info
        component = registry.get(info.kind, info.name)
        for name, field in component.options_class.model_fields.items():
            assert field.description, (info, name)
assert not registry.broken, registry.broken
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
