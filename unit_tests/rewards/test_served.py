"""Which rewards are served, under which names, and what their versions depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from velatura.api import VelaturaError
from velatura.core.pipeline import plan_run
from velatura.core.served import Served, reward_by_name, rewards_of_recipe

Make = Callable[..., Any]
SHARPNESS = {"use": "tinyworld-sharpness", "name": "sharp"}


@pytest.fixture
def served(tmp_path: Path) -> Make:
    """The rewards of a recipe with these stages."""

    def make(*stages: list[dict[str, Any]], stage: str | None = None) -> dict[str, Served]:
        recipe = {
            "engine": {"kind": "local", "device": "cpu"},
            "adapter": {"use": "tinyworld", "with": {"weights": None}},
            "task": {"use": "tinyworld", "with": {"task": "t2i", "count": 8}},
            "stages": {f"s{i}": {"stage": "rl", "rewards": rewards} for i, rewards in enumerate(stages)},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return {one.label: one for one in rewards_of_recipe(plan_run(path), None, stage)}

    return make


def test_every_reward_is_served_once_by_the_name_it_has_in_the_recipe(served: Make) -> None:
    aesthetics = {"use": "tinyworld-aesthetics"}
    found = served([SHARPNESS, aesthetics], [SHARPNESS | {"weight": 0.5}])
    assert {label: one.use for label, one in found.items()} == {
        "sharp": "tinyworld-sharpness", "tinyworld-aesthetics": "tinyworld-aesthetics"
    }  # fmt: skip
    assert list(served([SHARPNESS], [aesthetics], stage="s1")) == ["tinyworld-aesthetics"]


def test_two_rewards_of_one_name_are_refused_unless_a_stage_is_chosen(served: Make) -> None:
    other = SHARPNESS | {"with": {"gain": 2.0}}
    with pytest.raises(VelaturaError, match=r"stages 's0' and 's1' have different rewards called 'sharp'.*--stage s0"):
        served([SHARPNESS], [other])
    assert served([SHARPNESS], [other], stage="s1")["sharp"].model.options.gain == 2


def test_rewards_that_compare_are_left_out_and_alone_refused(served: Make) -> None:
    pairs = {"use": "vlm-pairs", "with": {"rubric": "aesthetics", "model": "x"}}
    assert list(served([SHARPNESS, pairs])) == ["sharp"]
    with pytest.raises(VelaturaError, match="no reward that scores single pictures"):
        served([pairs])


def test_the_version_of_a_reward_changes_with_its_options_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(image, prompt, **more):\n    return 1.0\n")

    def version(*settings: str) -> str:
        return reward_by_name("function", ["file=./mine.py", "call=f", *settings], [], "cpu", "mine").version

    first = version()
    assert version() == first
    assert version("arguments.gain=2") != first
    (tmp_path / "mine.py").write_text("def f(image, prompt, **more):\n    return 2.0\n")
    assert version() != first


def test_a_plugin_file_can_be_served(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "first_reward" / "my_reward.py"
    one = reward_by_name("redness", [], [str(example)], "cpu", "red")
    assert (one.label, one.use) == ("red", "redness")
