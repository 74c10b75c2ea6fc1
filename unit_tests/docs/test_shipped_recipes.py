"""Every recipe that ships resolves on whatever model folder it is given, says how far it was tried, and has prompts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from velatura.api import Context
from velatura.core.build import build, open_registry, resolve_options
from velatura.core.check import check_combinations
from velatura.core.recipe import Recipe, Ref, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LEVELS = ("converged", "short run", "resolves")


def swapped(path: Path) -> Recipe:
    """The recipe, with a model folder of somebody's own where it names a published one."""
    recipe = load_recipe(path)
    published = recipe.adapter is not None and "path" in recipe.adapter.with_
    return load_recipe(path, ["adapter.with.path=/models/tiny"] if published else [])


def prompts(recipe: Recipe, ref: Ref, split: str) -> list:
    task = build(open_registry(recipe), "task", ref)
    task.setup(Context(device="cpu", cache=ROOT, seed=0, base=recipe.folder.resolve()))
    return list(task.prompts(split))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_resolves_with_another_model_and_warns_of_nothing_but_rewards_without_a_card(path):
    recipe = swapped(path)
    registry = open_registry(recipe)
    resolve_options(registry, recipe)
    said = check_combinations(recipe, registry)
    without_card = [warning for warning in said if "trains under allow_unvalidated_reward: it" in warning]
    assert said == without_card
    assert bool(without_card) == ("allow_unvalidated_reward: true" in path.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_header_says_how_far_it_was_tried(path):
    header = re.match(r"(?:#.*\n)+", path.read_text())[0]
    (level,) = re.findall(r"^# VERIFICATION: (.*)$", header, flags=re.MULTILINE)
    assert level.startswith(LEVELS)
    assert ("never run at full size" in header.replace("\n# ", " ")) == level.startswith("resolves")


@pytest.mark.parametrize("path", [p for p in RECIPES if "prompts/" in p.read_text()], ids=lambda path: path.stem)
def test_prompts_ship_enough_for_a_step_and_none_is_both_trained_on_and_held_out(path):
    recipe = load_recipe(path)
    for name, stage in recipe.stages.items():
        if stage.stage != "rl":
            continue
        curation = recipe.stages.get(stage.prompts) if stage.prompts else None
        dropped = curation.prompt_filter.with_["quantile"] if curation else 0.0
        ref = recipe.task_of(name)
        train, held_out = prompts(recipe, ref, "train"), prompts(recipe, ref, "eval")
        assert len(train) - math.floor(dropped * len(train)) >= stage.prompts_per_step
        assert not {(p.text, len(p.sources)) for p in train} & {(p.text, len(p.sources)) for p in held_out}
        assert {p.category for p in held_out} <= {p.category for p in train}
        for reward in stage.rewards:
            assert set(reward.weight_by_category) <= {p.category for p in train}
