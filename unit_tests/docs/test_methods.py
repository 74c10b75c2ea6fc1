"""The page of methods is what its generator writes, and its recipes are not refused."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from velatura.core.check import check_combinations
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"
BLOCKS = re.findall(r"^```yaml\n# fragment\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_it_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate_methods", ROOT / "docs" / "generate_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert PAGE.read_text() == module.page(), "run python docs/generate_methods.py"


def merged(below: object, above: object) -> object:
    if not (isinstance(below, dict) and isinstance(above, dict)) or "use" in above:
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}


@pytest.mark.parametrize("text", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_its_recipes_are_not_refused(text: str, tmp_path: Path) -> None:
    whole = merged(yaml.safe_load((ROOT / "recipes" / "tinyworld.yaml").read_text()), yaml.safe_load(text))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    check_combinations(load_recipe(path), Registry.discover())


def test_every_component_has_its_formula_its_source_its_defaults_and_what_the_source_leaves_open() -> None:
    body = PAGE.read_text().split("\n## Components\n")[1].split("\n## ")[0]
    parts = re.findall(r"^#### (\w+ `[\w-]+`)\n(.*?)(?=^###|\Z)", body, re.MULTILINE | re.DOTALL)
    assert len(parts) > 40
    for name, text in parts:
        said = text.split("```")[1]
        assert re.search(r"[\w)|\]] (=|<=|>) ", said) or name == "timesteps `window`", f"{name} has no formula"
        assert re.search(r"arXiv:\d{4}\.\d{5}|\b(?:18|19|20)\d\d\)|\bours\b", said), f"{name} has no source"
        assert re.search(r"^(Defaults: |No options\.$)", text, re.MULTILINE), name
        assert re.search(r"^The source does not say: .{5}", text, re.MULTILINE), name


@pytest.mark.parametrize("number", range(1, 11))
def test_every_identity_of_the_list_has_its_row(number: int) -> None:
    assert re.search(rf"^\| {number} .*`unit_tests/.*::test_\w+`", PAGE.read_text(), re.MULTILINE)
