"""The fixed states that progress is measured on: what `velatura check` says of them is what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from velatura.api import Role
from velatura.core.check import set_up
from velatura.core.estimate import work
from velatura.core.learner import Learner
from velatura.core.memory import MemoryPlan
from velatura.core.pipeline import Plan, plan_run
from velatura.core.placement import Placement
from velatura.core.policy import CURRENT
from velatura.core.probe import Probe, make_probe, probe_error, start_probe
from velatura.plugins.guidance.policies import RolloutOnly, TeacherOnly
from velatura.plugins.objectives.nft import NFT

TINY = Path(__file__).parents[2] / "integration_tests" / "recipes" / "tiny.yaml"
SMALL = ("sampling={steps: 7, batch: 16}", "stages.teacher_t2i.steps=25", "stages.teacher_t2i.probe_prompts=5")
"""Three states of a trajectory; five of them go through the network together."""
Make = Callable[..., Any]


def recipe(*overrides: str) -> Plan:
    return plan_run(TINY, [*SMALL, *overrides])


def look(plan: Plan) -> Callable[..., Any]:
    return lambda ref, split: set_up(plan, "task", ref).prompts(split)


def said(plan: Plan, stage: str) -> list[int]:
    """Rows of a step that belong to no sample of it, by kind of prompt."""
    adapter = set_up(plan, "adapter", plan.recipe.stage(stage).adapter)  # type: ignore[union-attr]
    parts = work(plan.recipe, plan.registry, stage, adapter, look(plan))
    assert all(part.rows.gradient == 0 for part in parts if part.samples == 0)
    return [part.rows.forward for part in parts if part.samples == 0]


def planned(plan: Plan, stage: str) -> MemoryPlan:
    adapter = set_up(plan, "adapter", plan.recipe.stage(stage).adapter)  # type: ignore[union-attr]
    found = Placement(plan.recipe, plan.registry).plan(stage, adapter, look(plan))
    assert found is not None
    return found


def of_the_start(learner: Make, sampler: Make, prompts: list[Any]) -> tuple[Probe, Learner]:
    guidance = RolloutOnly(RolloutOnly.options_class(scale=2.0))
    learn = learner(NFT(), guidance)
    start = {name: value.clone() for name, value in learn.policy.weights().items()}
    return start_probe(learn, sampler(guidance, steps=7, batch=16), prompts, 5, start, seed=0), learn


def test_its_forwards_are_counted_as_their_mean_over_the_steps(
    learner: Make, sampler: Make, net: nn.Module, drawings: Make, forwards: Make
) -> None:
    """A rollout of 7 guided steps and its targets at the start, then after steps 10, 20 and 25."""
    rows = forwards(net)
    probe, learn = of_the_start(learner, sampler, drawings(5))
    for _ in range(3):
        assert probe.drift(learn)["probe/kl"] == 0
    assert said(recipe(), "teacher_t2i") == [-(-sum(rows) // 25)]
    assert sum(rows) == 5 * (7 * 2 + 3 * (1 + 3))
    assert said(recipe("stages.teacher_t2i.probe_prompts=0"), "teacher_t2i") == []


def test_so_are_those_of_a_student_on_the_states_of_each_teacher(
    learner: Make, sampler: Make, net: nn.Module, drawings: Make, forwards: Make
) -> None:
    """Under the teacher's guidance for its rollout and its answers, without for the student's, after steps 1, 3, 6."""
    guidance = TeacherOnly(TeacherOnly.options_class(scale=2.0))
    learn = learner(NFT(), guidance)
    learn.policy.remember("teacher/t2i")
    rows = forwards(net)
    draws = sampler(guidance, steps=7, batch=16, role=Role.CURRENT)
    probe = make_probe(learn, draws, "t2i", "teacher/t2i", drawings(4), seed=0)
    for _ in range(3):
        probe_error(learn, probe)
    each = -(-sum(rows) // 6)
    assert said(recipe(), "student") == [each, each]  # drawings and edits


def test_what_it_keeps_and_needs_is_in_the_plan_of_memory(
    learner: Make, sampler: Make, drawings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, learn = of_the_start(learner, sampler, drawings(5))
    kept = [tensor for batch in probe.batches for tensor in (batch.points.x, batch.points.x_next) if tensor is not None]
    kept += probe.targets
    plan = planned(recipe(), "teacher_t2i")
    part = plan.part("states that progress is measured on")
    assert part.size == sum(tensor.nbytes for tensor in kept)
    assert {"update", "step", "rollout"} <= set(part.phases)
    largest = max(len(batch.points.x) for batch in probe.batches)
    asked: list[int] = []
    original = type(learn.adapter).velocity

    def velocity(adapter: Any, net: nn.Module, x: torch.Tensor, *more: Any) -> torch.Tensor:
        asked.append(len(x))
        return original(adapter, net, x, *more)

    monkeypatch.setattr(type(learn.adapter), "velocity", velocity)
    probe.drift(learn)
    assert max(asked) == largest == 15  # of at most 16
    without = planned(recipe("stages.teacher_t2i.probe_prompts=0"), "teacher_t2i")
    assert without.part(part.name).size == 0
    one = recipe("stages.teacher_t2i.probe_prompts=1", "stages.teacher_t2i.micro_batch=2", "sampling.batch=64")
    many = recipe("stages.teacher_t2i.probe_prompts=8", "stages.teacher_t2i.micro_batch=2", "sampling.batch=64")
    roles = [planned(each, "teacher_t2i").part("forwards of other roles").size or 0 for each in (one, many)]
    assert roles[1] > 2 * roles[0]
    assert learn.policy.same("old", CURRENT)


@pytest.mark.parametrize(("steps", "batch", "sizes"), [
    (7, 16, [15]), (7, 8, [6, 6, 3]), (7, 2, [2, 1] * 5), (1, 2, [2, 2, 1])
])  # fmt: skip
def test_its_states_go_through_the_network_in_batches_of_the_sampler(
    steps: int, batch: int, sizes: list[int], learner: Make, sampler: Make, drawings: Make
) -> None:
    """Those of teachers too: a trajectory of forty steps is twenty states for each sample."""
    guidance = TeacherOnly(TeacherOnly.options_class(scale=1.0))
    learn = learner(NFT(), guidance)
    learn.policy.remember("teacher/t2i")
    draws = sampler(guidance, steps=steps, batch=batch)
    start = {name: value.clone() for name, value in learn.policy.weights().items()}
    for probe in (
        make_probe(learn, draws, "t2i", "teacher/t2i", drawings(5), seed=0),
        start_probe(learn, draws, drawings(5), 5, start, seed=0),
    ):
        assert [len(part.points.x) for part in probe.batches] == sizes
        assert [len(target) for target in probe.targets] == sizes


def test_drift_is_a_mean_square_and_a_ratio_of_sizes_over_all_its_states(
    learner: Make, sampler: Make, drawings: Make
) -> None:
    probe, learn = of_the_start(learner, sampler, drawings(5))
    assert probe.drift(learn) == {"probe/kl": 0.0, "probe/norm_ratio": pytest.approx(1)}
    with torch.no_grad():
        for weight in learn.policy.parameters.values():
            weight.mul_(1.1)
    learn.policy.changed()
    now, start = torch.cat([learn.current_velocity(batch) for batch in probe.batches]), torch.cat([*probe.targets])
    closed = {"probe/kl": float((now - start).square().mean()), "probe/norm_ratio": float(now.norm() / start.norm())}
    assert closed["probe/kl"] > 1e-4 and abs(closed["probe/norm_ratio"] - 1) > 0.01
    assert probe.drift(learn) == pytest.approx(closed, rel=1e-4)
