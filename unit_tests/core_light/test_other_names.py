"""Names that papers use are answered with what a recipe writes in their place, which exists."""

from __future__ import annotations

import re

import pytest

from velatura.core.errors import RecipeError
from velatura.core.other_names import OTHER_NAMES
from velatura.core.registry import Registry

CASES = [(kind, name) for kind, names in OTHER_NAMES.items() for name in names]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[name for _, name in CASES])
def test_a_paper_s_name_is_answered_with_components_that_there_are(kind: str, name: str, registry: Registry) -> None:
    for spelt in (name, name.replace("-", "_").upper(), name.replace("-", "")):
        with pytest.raises(RecipeError, match=rf"^here: no {kind} is called '{spelt}'\. .* here\.$") as caught:
            registry.get(kind, spelt, "here")
        offered = re.findall(r"'([\w-]+)'", str(caught.value).split("called", 1)[1])[1:]
        there = {info.name for info in registry.list()}
        assert offered and set(offered) <= there


def test_other_mistakes_are_answered_as_before(registry: Registry) -> None:
    with pytest.raises(RecipeError, match=r"no objective is called 'flow_grpo'\. Did you mean 'flow-grpo'"):
        registry.get("objective", "flow_grpo")
