"""What the stages do with their parts: points of supervised training, probes, and groups with a signal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from velatura.api import Advantages, Prompt, RewardReport, Role, Rollout, RolloutPart, StepPlan
from velatura.core.errors import RecipeError
from velatura.core.learner import Learner
from velatura.core.points import MicroBatch
from velatura.core.probe import make_probe, probe_error
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry
from velatura.core.rollout import Chunk, Sampler
from velatura.core.stages.common import MetricsLog, StageRun
from velatura.core.stages.distill import Loop, Visit
from velatura.core.stages.rl import groups_of, groups_to_learn, with_signal
from velatura.core.stages.supervised import micro_batches
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter
from velatura.plugins.distillers.velocity_match import VelocityMatch
from velatura.plugins.guidance.policies import TeacherOnly
from velatura.schedulers.kernels import Ode

Make = Callable[..., Any]
CPU = torch.device("cpu")


def advantages(values: list[float], valid: list[bool] | None = None) -> Advantages:
    return Advantages(values=torch.tensor(values), valid=torch.tensor(valid or [True] * len(values)))


def rollout_of(prompts: list[Prompt], group: int) -> Rollout:
    rows = torch.arange(len(prompts)).repeat_interleave(group)
    return Rollout(
        prompts=tuple(prompts), samples=(), group=rows, parts=(),
    )  # fmt: skip


def test_groups_without_a_signal_are_dropped(drawings: Make) -> None:
    prompts = drawings(4)
    report = RewardReport(
        names=("r",), prompts=tuple(prompts), scores=torch.zeros(8, 1), status=torch.zeros(8, 1, dtype=torch.int64),
        weight=torch.ones(8, 1), group=torch.arange(4).repeat_interleave(2),
    )  # fmt: skip
    valid = [True] * 6 + [False, True]
    assert with_signal(report, advantages([0, 0, 1, -1, 0, 0, 5, 0], valid)) == [1]


def test_each_layout_has_its_own_samples_counted_from_its_start(drawings: Make, edits: Make) -> None:
    prompts = [*drawings(2), *edits(2)]
    groups = list(groups_to_learn(rollout_of(prompts, 2), advantages([1, -1, 0, 0, 1, -1, 2, -2])).values())
    plan = StepPlan.training(torch.arange(1), steps=1)
    first, second = (
        RolloutPart(start=start, latents=torch.zeros(4, 2), times=torch.tensor([1.0, 0.0]), plan=plan)
        for start in (0, 4)
    )
    assert [group.samples for group in groups_of(first, groups)] == [(0, 1), (2, 3)]
    assert [(group.prompt.task, group.samples) for group in groups_of(second, groups)] == [
        ("edit", (0, 1)),
        ("edit", (2, 3)),
    ]


def test_samples_that_are_not_valid_are_dropped_and_the_others_keep_their_numbers(drawings: Make) -> None:
    made = rollout_of(drawings(2), 3)
    valid = [True, False, True, False, False, False]
    groups = groups_to_learn(made, advantages([1, 9, -1, 5, 5, 5], valid))
    assert {row: (group.samples, group.numbers) for row, group in groups.items()} == {0: ((0, 2), (0, 2))}


SUPERVISED = """\
seed: 11
adapter: {use: tinyworld, with: {weights: null, width: 48, heads: 3, layers: 2}}
task: {use: tinyworld, with: {task: both, targets: true, count: 64}}
stages:
  first: {stage: supervised, batch: 8, logit_mean: 0.4, logit_std: 1.2, drop_condition: 0.5}
"""


@pytest.fixture
def supervised(tmp_path: Path) -> StageRun:
    path = tmp_path / "recipe.yaml"
    path.write_text(SUPERVISED)
    recipe = load_recipe(path)
    return StageRun(
        name="first", config=recipe.stage("first"), recipe=recipe, registry=Registry.discover(),
        folder=tmp_path / "first", run_folder=tmp_path, seed=recipe.seed, device=CPU, base=tmp_path,
    )  # fmt: skip


@pytest.fixture
def training(adapter: TinyWorldAdapter) -> Any:
    """As much of a training as making points needs."""
    return SimpleNamespace(adapter=adapter, engine=SimpleNamespace(device=CPU))


def both_tasks(stage: StageRun, count: int) -> list[Prompt]:
    prompts = stage.task_of("first").prompts("train")
    return [prompts[i] for i in range(count)]


def points_by_prompt(batches: list[MicroBatch]) -> dict[str, Any]:
    return {p.id: (batch, i) for batch in batches for i, p in enumerate(batch.prompts)}


def test_supervised_points_lie_between_the_given_picture_and_noise(supervised: StageRun, training: Any) -> None:
    prompts = both_tasks(supervised, 8)
    batches = micro_batches(supervised, training, prompts, 0)
    assert [{p.task for p in batch.prompts} for batch in batches] == [{"t2i"}, {"edit"}]
    assert sum(float(batch.points.weight.sum()) for batch in batches) == pytest.approx(1)
    for prompt in prompts:
        batch, i = points_by_prompt(batches)[prompt.id]
        points = batch.points
        assert prompt.target is not None
        x0 = training.adapter.latents(prompt.target[None])[0]
        t, u = points.t[i], points.target[i]
        torch.testing.assert_close(points.x[i], x0 + t * u, rtol=0, atol=1e-5)
        torch.testing.assert_close(points.x0[i], x0)
        assert 0 < t < 1


def test_a_picture_may_give_several_points_that_read_its_prompt_once(supervised: StageRun, training: Any) -> None:
    config = supervised.config.model_copy(update={"points": 3})
    prompts = both_tasks(supervised, 4)
    batches = micro_batches(replace(supervised, config=config), training, prompts, 0)
    assert [len(batch.prompts) for batch in batches] == [2, 2]
    for batch in batches:
        assert batch.rows.tolist() == [0, 0, 0, 1, 1, 1]
        x0 = training.adapter.latents(torch.stack([p.target for p in batch.prompts]))
        torch.testing.assert_close(batch.points.x0, x0.repeat_interleave(3, 0))
        assert len(batch.points.t.unique()) == 6
        assert len({tuple(noise.flatten().tolist()) for noise in batch.points.target}) == 6
    torch.testing.assert_close(sum(batch.points.weight.sum() for batch in batches), torch.tensor(1.0))


def test_supervised_points_are_a_function_of_seed_and_step(supervised: StageRun, training: Any) -> None:
    prompts = both_tasks(supervised, 4)
    first, again = (micro_batches(supervised, training, prompts, 5)[0].points for _ in range(2))
    other = micro_batches(supervised, training, prompts, 6)[0].points
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.t, other.t)


def test_supervised_times_are_logit_normal_and_a_share_of_prompts_loses_its_text(
    supervised: StageRun, training: Any
) -> None:
    prompts = [replace(both_tasks(supervised, 1)[0], id=str(i)) for i in range(2000)]
    (batch,) = micro_batches(supervised, training, prompts, 0)
    logits = batch.points.t.logit()
    assert float(logits.mean()) == pytest.approx(0.4, abs=0.1)  # standard error 0.027
    assert float(logits.std()) == pytest.approx(1.2, abs=0.1)
    dropped = [p.text == "" for p in batch.prompts]
    assert sum(dropped) / 2000 == pytest.approx(0.5, abs=0.05)  # standard error 0.011


def test_a_prompt_without_a_picture_cannot_be_learned_from(supervised: StageRun, training: Any) -> None:
    prompts = [replace(both_tasks(supervised, 1)[0], target=None)]
    with pytest.raises(RecipeError, match=r"stages\.first\.task: prompt 'tinyworld/t2i/train/000000' has no target"):
        micro_batches(supervised, training, prompts, 0)


class AgreeableTeacher(TeacherOnly):
    """Guided everywhere by 1: the teacher's guided velocity is its conditional one."""

    def scale(self, role: Role, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)


def probing(learner: Make, sampler: Make, guidance: Any) -> tuple[Learner, Sampler]:
    learn: Learner = learner(VelocityMatch(), guidance)
    learn.policy.remember("teacher/t2i")
    return learn, sampler(guidance, role=Role.CURRENT)


def test_the_probe_error_of_a_student_that_is_its_guided_teacher_is_0(
    learner: Make, sampler: Make, drawings: Make
) -> None:
    learn, draws = probing(learner, sampler, AgreeableTeacher())
    probe = make_probe(learn, draws, "t2i", "teacher/t2i", drawings(3), seed=0)
    assert probe_error(learn, probe) == 0


def test_the_probe_error_is_the_mean_squared_difference_to_the_guided_teacher(
    learner: Make, sampler: Make, adapter: TinyWorldAdapter, net: nn.Module, drawings: Make
) -> None:
    prompts = drawings(3)
    learn, draws = probing(learner, sampler, TeacherOnly())
    probe = make_probe(learn, draws, "t2i", "teacher/t2i", prompts, seed=0)
    batch = probe.batches[0]
    cond, null = adapter.encode(prompts), adapter.null(prompts)
    with torch.no_grad():
        own, without = (adapter.velocity(net, batch.points.x, batch.points.t, c, batch.rows) for c in (cond, null))
    expected = float((3 * (own - without)).square().mean())  # guided - own = (4 - 1)(own - without)
    assert expected > 1e-4
    assert probe_error(learn, probe) == pytest.approx(expected, rel=1e-4)


def test_probe_states_do_not_move_with_the_student(learner: Make, sampler: Make, drawings: Make) -> None:
    learn, draws = probing(learner, sampler, TeacherOnly())
    before = make_probe(learn, draws, "t2i", "teacher/t2i", drawings(2), seed=0)
    with torch.no_grad():
        for weight in learn.policy.parameters.values():
            weight.mul_(1.1)
    learn.policy.changed()
    after = make_probe(learn, draws, "t2i", "teacher/t2i", drawings(2), seed=0)
    assert torch.equal(before.batches[0].points.x, after.batches[0].points.x)
    assert torch.equal(before.targets[0], after.targets[0])
    assert probe_error(learn, before) == probe_error(learn, after)


def test_a_log_that_goes_on_from_a_checkpoint_forgets_what_came_after_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, start=0)
    for step in range(4):
        log.add(step, {"loss": 0.1 + step})
    path.write_text(path.read_text() + '{"step": 4, "lo')  # killed in the middle of a line
    MetricsLog(path, start=2).add(2, {"loss": 7.0})
    lines = path.read_text().splitlines()
    assert lines == ['{"step": 0, "loss": 0.1}', '{"step": 1, "loss": 1.1}', '{"step": 2, "loss": 7.0}']


def visit(prompts: list[Prompt], numbers: list[int], of: int) -> Visit:
    """Some prompts of a route in the hands of the student, one sample each."""
    rows = torch.arange(len(prompts))
    latents = torch.zeros(len(prompts), 2)
    trajectory = torch.arange(4.0)[:, None, None] + torch.zeros(4, len(prompts), 2)
    chunk = Chunk(rows=rows, samples=(), latents=latents, trajectory=trajectory, network_rows=0)
    plan = StepPlan.training(torch.tensor([0, 2]), steps=3)
    times = torch.tensor([1.0, 0.6, 0.3, 0.0])
    return Visit(step=0, chunk=chunk, prompts=prompts, numbers=numbers, times=times, plan=plan, of=of)


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_the_updates_of_a_distillation_step_share_its_prompts_and_weigh_routes_alike(
    drawings: Make, edits: Make, updates: int
) -> None:
    config = SimpleNamespace(updates_per_step=updates, micro_batch=100)
    loop = SimpleNamespace(
        stage=SimpleNamespace(config=config),
        streams={"t2i": 0, "edit": 0},
        sampler=SimpleNamespace(kernel=Ode()),
        teacher=lambda step, prompt: f"teacher/{prompt.task}",
    )
    loop.ask = lambda *a, **k: Loop.ask(loop, *a, **k)
    draw, change = drawings(5), edits(3)
    visits = [visit(draw[:2], [0, 1], 5), visit(draw[2:], [2, 3, 4], 5), visit(change, [0, 1, 2], 3)]
    seen: list[str] = []
    for share in range(updates):
        batches = Loop.micro_batches(loop, visits, share)
        seen += [prompt.id for batch in batches for prompt in batch.prompts]
        for teacher in ("teacher/t2i", "teacher/edit"):
            weight = sum(float(batch.points.weight.sum()) for batch in batches if batch.teacher == teacher)
            assert weight == pytest.approx(0.5)
    assert sorted(seen) == sorted(prompt.id for prompt in [*draw, *change])
