from __future__ import annotations

from collections.abc import Callable

import pytest

from velatura.core.errors import RecipeError
from velatura.core.recipe import Ref, load_recipe


def test_values_are_read_as_yaml(pipeline: str) -> None:
    overrides = ["seed=7", "stages.teacher.optimizer.betas=[0.8, 0.9]", "stages.teacher.share_noise=false"]
    recipe = load_recipe(pipeline, overrides)
    assert recipe.seed == 7
    assert recipe.stage("teacher").optimizer.betas == (0.8, 0.9)
    assert recipe.stage("teacher").share_noise is False


def test_an_option_of_a_component_that_the_recipe_does_not_mention(pipeline: str) -> None:
    recipe = load_recipe(pipeline, ["stages.teacher.objective.with.beta=0.5"])
    assert recipe.stage("teacher").objective == Ref(use="nft", with_={"beta": 0.5})


def test_an_option_of_a_component_in_its_short_form(pipeline: str) -> None:
    recipe = load_recipe(pipeline, ["adapter.with.width=8", "stages.pick.task.with.task=t2i"])
    assert recipe.stage("student").adapter == Ref(use="tiny", with_={"width": 8})
    assert recipe.stage("pick").task == Ref(use="world", with_={"task": "t2i"})


def test_one_stage_can_depart_from_the_default(pipeline: str) -> None:
    overrides = ["stages.teacher.adapter.with.rank=4", "stages.teacher.rewards.0.weight=5"]
    recipe = load_recipe(pipeline, overrides)
    assert recipe.stage("teacher").adapter == Ref(use="tiny", with_={"rank": 4})
    assert recipe.stage("student").adapter == Ref(use="tiny")
    assert (recipe.stage("teacher").rewards[0].weight, recipe.stage("pick").rewards[0].weight) == (5, 2)


def test_items_of_lists_are_counted_from_zero(pipeline: str) -> None:
    assert load_recipe(pipeline, ["rewards.0.weight=3"]).stage("pick").rewards[0].weight == 3
    assert load_recipe(pipeline, ["stages.compare.models.1=student"]).stage("compare").models[1] == "student"


def test_later_overrides_win(pipeline: str) -> None:
    assert load_recipe(pipeline, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed", "'seed' is not an override; write path.to.field=value, like seed=1"),
        ("a..b=1", "'a..b=1' is not an override; write path.to.field=value, like seed=1"),
        ("seed=[1", "the value of 'seed=[1' is not YAML"),
        ("stages.techer.steps=1", "no stage is called 'techer'. Did you mean 'teacher'?"),
        ("stages.teacher.objctive.use=nft", "stages.teacher.objctive: no such key. Did you mean 'objective'?"),
        ("rewards.3.weight=1", "rewards is a list of 1; it has no item '3'"),
        ("seed.x=1", "seed is 3; it has no part 'x'"),
        ("stages.teacher.prompts.x=1", "stages.teacher.prompts is 'pick'; it has no part 'x'"),
    ],
)
def test_what_is_wrong_with_an_override_is_said(pipeline: str, override: str, complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(pipeline, [override])
    assert str(caught.value) == f"command line: {complaint}"


def test_an_override_can_make_a_stage(write: Callable[..., str]) -> None:
    name = write("adapter: tiny\nstages:\n  a: {stage: supervised, task: world}\n")
    assert load_recipe(name, ["stages.b={stage: export, model: a}"]).order() == ["a", "b"]


def test_an_override_of_an_alias_changes_that_place_alone(write: Callable[..., str]) -> None:
    name = write("""\
        adapter: tiny
        stages:
          a:
            stage: curate
            task: world
            rewards: &both [{use: good, weight: 1.0}]
          b: {stage: rl, prompts: a, rewards: *both}
        """)
    recipe = load_recipe(name, ["stages.b.rewards.0.weight=0.2"])
    assert [recipe.stage(stage).rewards[0].weight for stage in "ab"] == [1.0, 0.2]
    assert load_recipe(name, ["stages.a.rewards.0.weight=0.2"]).stage("b").rewards[0].weight == 1.0


def test_an_override_of_a_students_guidance_starts_from_its_own_default(pipeline: str) -> None:
    top = "guidance={use: rollout-only, with: {scale: 2.0}}"
    recipe = load_recipe(pipeline, [top, "stages.student.guidance.with.scale=3.0"])
    assert recipe.stage("student").guidance == Ref(use="teacher-only", with_={"scale": 3.0})
    assert load_recipe(pipeline, [top, "stages.teacher.guidance.with.scale=3.0"]).stage("teacher").guidance == Ref(
        use="rollout-only", with_={"scale": 3.0}
    )
