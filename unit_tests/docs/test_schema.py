"""The schema that editors use: every shipped recipe is valid by it, and mistakes are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from velatura.core.recipe import recipe_schema
from velatura.core.registry import Registry
from velatura.core.schema import with_components
from velatura.core.source import read

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    [*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("examples/**/*.yaml"), *ROOT.glob("integration_tests/recipes/*.yaml")]
)
RECIPES = [path for path in RECIPES if "stages:" in path.read_text()]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found = with_components(recipe_schema(), Registry.discover())
    Draft202012Validator.check_schema(found)
    return found


@pytest.fixture(scope="module")
def complaints(schema: dict[str, Any]) -> Callable[[Any], list[str]]:
    validator = Draft202012Validator(schema)
    return lambda data: ["/".join(map(str, error.absolute_path)) for error in validator.iter_errors(data)]


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_that_ships_is_valid(path: Path, complaints: Callable[[Any], list[str]]) -> None:
    assert complaints(read(path).data) == []


def change(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(data)
    place: Any = found
    *above, last = path.split("/")
    for part in above:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[int(last) if isinstance(place, list) else last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("sead", 1, ""),
        ("engine/kind", "locl", "engine/kind"),
        ("optimizer", {"learning_rate": 1.0}, "optimizer"),
        ("stages/teacher_t2i/steps", 0, "stages/teacher_t2i/steps"),
        ("stages/teacher_t2i/stepz", 2, "stages/teacher_t2i"),
        ("stages/teacher_t2i/objective", "ntf", "stages/teacher_t2i/objective"),
        ("stages/teacher_t2i/objective", {"use": "ntf"}, "stages/teacher_t2i/objective/use"),
        ("stages/teacher_t2i/objective", "ode", "stages/teacher_t2i/objective"),
        ("stages/teacher_t2i/objective", {"use": "nft", "with": {"bta": 1}}, "stages/teacher_t2i/objective/with"),
        (
            "stages/teacher_t2i/objective",
            {"use": "nft", "with": {"beta": "much"}},
            "stages/teacher_t2i/objective/with/beta",
        ),
        ("stages/teacher_t2i/rewards/0", {"use": "nft"}, "stages/teacher_t2i/rewards/0/use"),
        (
            "stages/teacher_t2i/rewards/0",
            {"use": "tinyworld-alignment", "wieght": 1},
            "stages/teacher_t2i/rewards/0",
        ),
        (
            "stages/teacher_t2i/rewards/0",
            {"use": "tinyworld-alignment", "weight": -1},
            "stages/teacher_t2i/rewards/0/weight",
        ),
        ("stages/teacher_t2i/rewards/0", "nft", "stages/teacher_t2i/rewards/0"),
        ("rewards", [{"use": "tinyworld-alignment", "weight": "much"}], "rewards/0/weight"),
        ("adapter", {"use": "tinyworld", "with": {"widht": 3}}, "adapter/with"),
        ("adapter", 3, "adapter"),
        ("stages/teacher_t2i/stage", "rlhf", "stages/teacher_t2i/stage"),
        ("stages/student/teachers", "teacher_t2i", "stages/student/teachers"),
    ],
)
def test_an_editor_underlines_a_mistake_where_it_stands(
    path: str, value: Any, place: str, complaints: Callable[[Any], list[str]]
) -> None:
    """One complaint; of a key that does not exist at the mapping that has it."""
    data = read(ROOT / "recipes" / "tinyworld.yaml").data
    assert complaints(change(data, path, value)) == [place]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stages/teacher_t2i/objective", "awm"),
        ("stages/teacher_t2i/objective", {"use": "nft", "with": None}),
        ("stages/teacher_t2i/objective", {"use": "mine/new", "with": {"anything": 1}}),
        ("stages/teacher_t2i/timesteps", "uniform"),
    ],
)
def test_what_a_run_takes_the_editor_takes(path: str, value: Any, complaints: Callable[[Any], list[str]]) -> None:
    data = read(ROOT / "recipes" / "tinyworld.yaml").data
    assert complaints(change(data, path, value)) == []


def test_options_are_described_for_completion(schema: dict[str, Any]) -> None:
    definitions = schema["$defs"]
    assert (
        "How many steps to train on"
        in definitions["options.timesteps.high-noise"]["properties"]["count"]["description"]
    )
    names = {entry.get("const"): entry.get("description") for entry in definitions["Ref.objective"]["else"]["anyOf"]}
    assert names["nft"]
    assert "ode" not in names


def test_a_plugin_file_joins_by_both_of_its_names(complaints: Callable[[Any], list[str]]) -> None:
    folder = ROOT / "examples" / "first_reward"
    registry = Registry.discover()
    registry.add_file(folder / "my_reward.py")
    own = Draft202012Validator(with_components(recipe_schema(), registry))
    data = read(folder / "recipe.yaml").data
    rewards = data["stages"]["redder"]["rewards"]
    for name, valid in (("my_reward/redness", True), ("redness", True), ("my_reward/rednes", False)):
        rewards[1] = {"use": name}
        assert own.is_valid(data) == valid
    rewards[1] = {"use": "redness"}
    assert complaints(data)  # the schema without the file does not know the bare name
