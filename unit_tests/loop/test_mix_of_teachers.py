"""How a round of distillation is shared out: routes weigh the same, and several teachers are asked by weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from velatura.api import Prompt, StepPlan
from velatura.core.rollout import Chunk
from velatura.core.stages.distill import Loop, Visit
from velatura.plugins.distillers.step_match import OPDKL
from velatura.plugins.distillers.velocity_match import VelocityMatch
from velatura.schedulers.kernels import Ode
from velatura.schedulers.stochastic import Cps
from velatura.schedulers.timesteps import All

STEPS = 4
TIMES = torch.linspace(1, 0, STEPS + 1)
MIXTURES = {"t2i": {"loud": 0.25, "quiet": 0.75}, "edit": {"editor": 1.0}}


def loop(updates: int) -> Loop:
    config = SimpleNamespace(updates_per_step=updates, micro_batch=6, mixtures=MIXTURES)
    parts = {"training": None, "learner": None, "timesteps": None, "probes": (), "showcases": ()}
    return Loop(
        stage=SimpleNamespace(seed=3, config=config), distiller=VelocityMatch(), sampler=SimpleNamespace(kernel=Ode()),
        streams=dict.fromkeys(MIXTURES), **parts,
    )  # type: ignore[arg-type]  # fmt: skip


def visit(route: str, count: int, trained: int) -> Visit:
    prompts = [Prompt(id=f"{route}/{i}", text="a cat", task=route) for i in range(count)]
    chunk = Chunk(
        rows=torch.arange(count), samples=(), latents=torch.zeros(count, 2), network_rows=0,
        trajectory=torch.zeros(STEPS + 1, count, 2),
    )  # fmt: skip
    plan = StepPlan.training(torch.arange(trained), steps=STEPS)
    return Visit(step=0, chunk=chunk, prompts=prompts, numbers=range(count), times=TIMES, plan=plan, of=count)


def test_the_plan_of_a_round_has_the_stage_s_weights_and_only_steps_with_a_likelihood() -> None:
    config = SimpleNamespace(step_weight="t")
    for objective, kernel, trained in ((VelocityMatch(), Ode(), [0, 1, 2, 3]), (OPDKL(), Cps(), [0, 1, 2])):
        parts = {
            "stage": SimpleNamespace(seed=3, config=config), "timesteps": All(),
            "sampler": SimpleNamespace(kernel=kernel), "learner": SimpleNamespace(objective=objective),
        }  # fmt: skip
        plan = replace(loop(1), **parts)._plan(0, "t2i", TIMES)  # type: ignore[arg-type]
        assert plan.train.tolist() == trained
        torch.testing.assert_close(plan.weight, TIMES[:-1] / TIMES[trained].mean())


@pytest.mark.parametrize("updates", [1, 3])
def test_routes_weigh_the_same_in_every_update_however_many_states_they_have(updates: int) -> None:
    visits = [visit("t2i", 9, trained=4), visit("edit", 3, trained=1)]
    for share in range(updates):
        batches = loop(updates).micro_batches(visits, share)
        weight = Counter[str]()
        for batch in batches:
            assert batch.teacher is not None and len({prompt.task for prompt in batch.prompts}) == 1
            weight[batch.teacher.split("/")[1]] += float(batch.points.weight.sum())  # type: ignore[assignment]
        assert dict(weight) == pytest.approx({"t2i": 0.5, "edit": 0.5})


def test_of_several_teachers_each_prompt_asks_one_as_often_as_its_weight_says() -> None:
    asked, prompts = loop(1), [Prompt(id=f"t2i/{i}", text="a cat", task="t2i") for i in range(50)]
    drawn = {(step, p.id): asked.teacher(step, p) for step in range(40) for p in prompts}
    share = Counter(drawn.values())["teacher/t2i/loud"] / len(drawn)
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(drawn)) ** 0.5
    assert len({drawn[0, p.id] for p in prompts}) == 2 and len({drawn[step, "t2i/0"] for step in range(40)}) == 2
    assert {asked.teacher(step, p) for step in range(3) for p in prompts[:3]} <= set(drawn.values())
    assert asked.teacher(0, Prompt(id="e", text="", task="edit")) == "teacher/edit"
