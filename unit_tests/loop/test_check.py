"""What does not go together is refused before anything runs, and what a run costs is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from velatura.api import Loss, NoOptions, PolicyObjective, Prompt, Requirements, Role, hookimpl
from velatura.core import commands
from velatura.core.check import check_combinations, set_up
from velatura.core.errors import RecipeError
from velatura.core.estimate import PATIENCE, RowSeconds, Speed, Work, seconds_per_row, work
from velatura.core.pipeline import Plan, plan_run
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry
from velatura.core.routes import routes_of_models
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter

TINY = Path(__file__).parents[2] / "integration_tests" / "recipes" / "tiny.yaml"


class AsksTeacher(PolicyObjective[NoOptions]):
    """Needs rewards and a teacher."""

    name = "asks-teacher"
    requires = Requirements(roles=frozenset({Role.CURRENT, Role.TEACHER}), advantage=True)

    def loss(self, points: Any, velocity: Any) -> Loss:
        raise NotImplementedError


class Compares(PolicyObjective[NoOptions]):
    """Needs no rewards, but a reference."""

    name = "compares"
    requires = Requirements(roles=frozenset({Role.CURRENT, Role.REFERENCE}), advantage=False)

    def loss(self, points: Any, velocity: Any) -> Loss:
        raise NotImplementedError


class Plugin:
    """Both."""

    @staticmethod
    @hookimpl
    def velatura_objective() -> list[type[Any]]:
        return [AsksTeacher, Compares]


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = Registry.discover()
    found.add(Plugin, "odd")
    return found


@pytest.fixture
def warnings(registry: Registry) -> Callable[..., list[str]]:
    return lambda *overrides: check_combinations(load_recipe(TINY, overrides), registry)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("stages.warm.objective=nft", "objective 'nft' needs rewards, which a supervised stage does not have"),
        ("stages.warm.objective=odd/compares", "needs the velocity of reference, which a supervised stage"),
        ("stages.teacher_t2i.objective=sft", "objective 'sft' does not look at rewards, so it does not go into"),
        ("stages.teacher_t2i.objective=odd/asks-teacher", "asks a teacher, so it does not go into a stage of kind rl"),
        ("stages.teacher_t2i.adapter.with.lora_rank=2", "but its teacher 'teacher_t2i' \\(t2i\\) has 'tinyworld' with"),
    ],
)
def test_what_cannot_work_is_refused(warnings: Callable[..., list[str]], override: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        warnings(override)


def test_adapters_that_say_the_same_in_other_words_are_the_same(warnings: Callable[..., list[str]]) -> None:
    assert warnings("stages.teacher_t2i.adapter.with.lora_rank=null") == warnings() == []


def test_a_weight_for_a_category_that_no_prompt_has_is_warned_about(warnings: Callable[..., list[str]]) -> None:
    (said,) = warnings("stages.curate_t2i.rewards.2.weight_by_category={portraits: 0.5}")
    assert "none of the first 512 prompts is of category 'portraits', so this weight does nothing" in said
    assert said.endswith("Did you mean 'portrait'?")


def test_a_start_with_guidance_folded_in_is_warned_about(warnings: Callable[..., list[str]]) -> None:
    again = "stages.again={stage: distill, init: student, teachers: {t2i: teacher_t2i}, guidance: {use: teacher-only, with: {scale: 2.0}}}"  # noqa: E501
    (said,) = warnings(again)
    assert "stages.again.init: 'student' is a student with guidance 2 folded in" in said
    assert warnings(again, "stages.student.guidance=none") != warnings(again)
    assert not any("folded in" in said for said in warnings(again, "stages.student.guidance=none"))


def test_guidance_stays_folded_in_through_further_training(warnings: Callable[..., list[str]]) -> None:
    task = "{use: tinyworld, with: {task: t2i, count: 8}}"
    more = f"stages.more={{stage: rl, init: student, task: {task}, rewards: [tinyworld-sharpness], guidance: none}}"
    most = f"stages.most={{stage: rl, init: more, task: {task}, rewards: [tinyworld-sharpness]}}"
    (said,) = warnings(more, most)
    assert "stages.most: 'more' has guidance folded in" in said


def parts(stage: str, *overrides: str) -> list[Work]:
    plan: Plan = plan_run(TINY, overrides)
    adapter = set_up(plan, "adapter", plan.recipe.stage(stage).adapter)  # type: ignore[union-attr]
    look = lambda ref, split: set_up(plan, "task", ref).prompts(split)  # noqa: E731
    return work(plan.recipe, plan.registry, stage, adapter, look)


def test_a_curation_draws_every_prompt_group_size_times() -> None:
    (part,) = parts("curate_t2i")
    assert (part.samples, part.rows.forward) == (8 * 4, 8 * 4 * 3 * 2)  # 3 steps, two branches


def test_a_round_of_learning_is_counted() -> None:
    (part,) = parts("teacher_t2i", "stages.teacher_t2i.objective.with.kl=0.0", "stages.teacher_t2i.probe_prompts=0")
    assert part.samples == 3 * 4
    assert part.rows.forward == 12 * 3 * 2 + 12 * 2  # the rollout, and the old policy at 2 of 3 times
    assert part.rows.gradient == 12 * 2


def test_an_evaluation_charges_each_model_on_its_own_routes_and_a_student_without_guidance() -> None:
    found = parts("compare")
    each = 4 * 4 * 3  # prompts, seeds, steps
    cost = [(part.prompt.task, part.rows.forward // each) for part in found]
    assert cost == [
        *(("t2i", 2), ("edit", 2)),  # warm
        *(("t2i", 2), ("edit", 2)),  # the two teachers
        *(("t2i", 1), ("edit", 1)),  # the student
    ]


def test_a_task_of_both_kinds_is_counted_by_kind_and_the_parts_add_up() -> None:
    found = parts("warm")
    assert {part.prompt.task for part in found} == {"t2i", "edit"}
    assert sum(part.samples for part in found) == sum(part.rows.gradient for part in found) == 16
    assert sum(part.rows.gradient for part in parts("warm", "stages.warm.points=3")) == 48


def test_speed_is_measured_under_the_threads_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measured(*_: object) -> RowSeconds:
        seen.append(torch.get_num_threads())
        return RowSeconds(forward=1.0, gradient=3.0)

    monkeypatch.setattr("velatura.core.estimate.seconds_per_row", measured)
    before = torch.get_num_threads()
    plan = plan_run(TINY)
    adapter = set_up(plan, "adapter", plan.recipe.stage("warm").adapter)  # type: ignore[union-attr]
    speed = Speed(before + 1)
    costs = [speed.seconds(adapter, part) for part in parts("warm") * 2]
    assert seen == [before + 1] * 2  # once for each kind
    assert sum(cost or 0 for cost in costs) == 2 * 3 * 16
    assert torch.get_num_threads() == before


class Slow:
    """A clock of a machine on which a row takes `seconds`, and the batches that it was asked to run."""

    def __init__(self, seconds: float, patch: pytest.MonkeyPatch) -> None:
        self.now, self.batches = 0.0, []
        original = TinyWorldAdapter.velocity

        def velocity(adapter: Any, net: Any, x: torch.Tensor, *more: Any) -> torch.Tensor:
            self.batches.append(len(x))
            self.now += seconds * len(x)
            return original(adapter, net, x, *more)

        patch.setattr(TinyWorldAdapter, "velocity", velocity)

    def __call__(self) -> float:
        return self.now


def tried(seconds: float, patch: pytest.MonkeyPatch, kind: str = "t2i") -> tuple[RowSeconds | None, list[int]]:
    """What is said of the tiny model on such a machine, and the rows that were run to find out."""
    adapter = set_up(plan_run(TINY), "adapter", plan_run(TINY).recipe.stage("warm").adapter)  # type: ignore[union-attr]
    sources = (torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)),) if kind == "edit" else ()
    clock = Slow(seconds, patch)
    prompt = Prompt(id="p", text="a red circle", task=kind, sources=sources)
    return seconds_per_row(adapter, prompt, torch.device("cpu"), clock), clock.batches


@pytest.mark.parametrize("kind", ["t2i", "edit"])
def test_speed_is_measured_on_many_rows_where_they_are_fast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, batches = tried(1e-4, monkeypatch, kind)
    assert found == RowSeconds(forward=pytest.approx(1e-4), gradient=pytest.approx(1e-4))
    assert batches[:8] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert batches[8:] == [128] * 10


@pytest.mark.parametrize("seconds", [0.01, 0.1, 1.0, 3.9])
def test_speed_is_measured_on_as_many_rows_as_there_is_time_for(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, batches = tried(seconds, monkeypatch)
    assert found == RowSeconds(forward=pytest.approx(seconds), gradient=pytest.approx(seconds))
    assert seconds * sum(batches) <= 2 * PATIENCE


def test_of_a_row_that_takes_longer_than_anybody_waits_two_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found, batches = tried(60.0, monkeypatch)
    assert found == RowSeconds(forward=60.0, gradient=60.0)
    assert batches == [1, 1]  # forward and backward, then forward


def test_a_row_of_many_weights_and_many_numbers_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyWorldAdapter, "describe", lambda _: {"parameters": 4e7})
    assert tried(1e-4, monkeypatch)[0] is not None
    wide = torch.zeros(1, 4096, 48)
    monkeypatch.setattr(TinyWorldAdapter, "noise", lambda *_: wide)
    assert tried(1e-4, monkeypatch) == (None, [])


def drawings(kind: str, count: int = 4) -> list[Prompt]:
    return [Prompt(id=f"{kind}/{i}", text="x", task=kind) for i in range(count)]


def test_a_teacher_is_measured_where_its_prompts_are_of_the_same_kind() -> None:
    recipe = load_recipe(TINY)
    look = lambda ref, split: drawings(ref.with_["task"])  # noqa: E731
    prompts = {"scenes": drawings("t2i"), "changes": drawings("edit")}
    found = routes_of_models(recipe, "compare", prompts, look)
    every = ["scenes", "changes"]
    assert found == {"warm": every, "teacher_t2i": ["scenes"], "teacher_edit": ["changes"], "student": every}
    crossed = routes_of_models(load_recipe(TINY, ["stages.compare.cross_task=true"]), "compare", prompts, look)
    assert crossed["teacher_t2i"] == every


def test_a_model_without_a_route_and_an_evaluation_of_nothing_are_refused() -> None:
    recipe = load_recipe(TINY)
    look = lambda ref, split: drawings(ref.with_["task"])  # noqa: E731
    with pytest.raises(
        RecipeError, match=r"'teacher_edit' was trained on prompts of kind edit, .*There is: t2i \(t2i\)"
    ):
        routes_of_models(recipe, "compare", {"t2i": drawings("t2i")}, look)
    with pytest.raises(
        RecipeError, match=r"no stage of the recipe has a task to evaluate on\. Give this stage its own"
    ):
        routes_of_models(recipe, "compare", {}, look)
    with pytest.raises(RecipeError, match="the task of route 't2i' has no prompt"):
        routes_of_models(recipe, "compare", {"t2i": []}, look)


def test_eval_adds_the_baseline_and_asks_that_nothing_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(commands, "run_pipeline", lambda path, overrides, **more: calls.append((overrides, more)))
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "tiny", "path": str(TINY), "overrides": ["seed=9"]}))
    commands.eval_run(tmp_path, ["student"])
    ((overrides, more),) = calls
    assert overrides == ["seed=9", f"output={tmp_path}", "stages.compare.models=[warm, student]"]
    assert (more["only"], more["remember"]) == ("compare", False)
