"""Every wrong recipe of corpus.yaml is answered with exactly the message that stands there, and with nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from velatura.core.build import open_registry, resolve_options
from velatura.core.check import check_combinations
from velatura.core.errors import VelaturaError
from velatura.core.recipe import load_recipe
from velatura.core.registry import DISTRIBUTION, GROUP

HERE = Path(__file__).parent
RECIPE = (HERE / "recipe.yaml").read_text()
CORPUS = yaml.safe_load((HERE / "corpus.yaml").read_text())


def changed(case: Mapping[str, str]) -> str:
    """The recipe with the mistake; a plugin file is named behind everything, so that lines stay where they are."""
    assert case["old"] in RECIPE
    text = RECIPE.replace(case["old"], case["new"], 1)
    return f"{text}\nplugins: [mine.py]\n" if "plugin" in case else text


def checked(text: str, case: Mapping[str, str] | None = None) -> None:
    """What `velatura check` does to find mistakes."""
    if case and "plugin" in case:
        Path("mine.py").write_text(case["plugin"])
    Path("recipe.yaml").write_text(text)
    recipe = load_recipe("recipe.yaml")
    registry = open_registry(recipe)
    resolve_options(registry, recipe)
    assert check_combinations(recipe, registry) == []


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where no other package's plugins are installed: messages say what there is."""
    monkeypatch.chdir(tmp_path)
    own = [entry for entry in entry_points(group=GROUP) if entry.dist and entry.dist.name == DISTRIBUTION]
    monkeypatch.setattr("velatura.core.registry.entry_points", lambda group: own)
    return tmp_path


def test_the_recipe_that_is_changed_has_no_mistake() -> None:
    checked(RECIPE)


def test_the_corpus_is_large_and_no_mistake_stands_in_it_twice() -> None:
    assert len(CORPUS) >= 60
    assert len({case["mistake"] for case in CORPUS}) == len(CORPUS)
    assert len({changed(case) + case.get("plugin", "") for case in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["mistake"].replace(" ", "_"))
def test_a_mistake_is_answered_with_where_it_is_and_what_to_do(case: Mapping[str, str], folder: Path) -> None:
    with pytest.raises(VelaturaError) as caught:
        checked(changed(case), case)
    assert str(caught.value).replace(f"{folder}/", "") == case["message"]


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["mistake"].replace(" ", "_"))
def test_a_message_names_the_file_and_a_line_that_was_changed(case: Mapping[str, str]) -> None:
    first, text = case["message"].splitlines()[0], changed(case)
    name, _, rest = first.partition(":")
    assert name == "recipe.yaml"
    number, _, said = rest.partition(":")
    assert 1 <= int(number) <= len(text.splitlines())
    assert said.strip()
