from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velatura.api import Points, Prompt, Role
from velatura.core.learner import Learner, Tally, with_zero_advantage
from velatura.core.points import Group, MicroBatch, PointNoise, forward_points, pieces
from velatura.core.policy import Policy
from velatura.core.rollout import by_layout
from velatura.core.summed import Summed, Term
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter
from velatura.plugins.distillers.velocity_match import VelocityMatch
from velatura.plugins.guidance.policies import Both, RolloutOnly, ScaleOptions, TeacherOnly
from velatura.plugins.objectives.awm import AWM
from velatura.plugins.objectives.nft import NFT, NFTOptions
from velatura.plugins.objectives.regularisers import EmaKL, EmaKLOptions
from velatura.plugins.objectives.sft import SFT

Make = Callable[..., Any]
STEPS = torch.tensor([1, 2, 4])


def micro_batches(adapter: TinyWorldAdapter, prompts: list[Prompt], limit: int, group: int = 3) -> list[MicroBatch]:
    """All points of one optimiser step."""
    count = len(prompts) * group
    draw = torch.Generator().manual_seed(5)
    latents, advantages = torch.randn(count, 16, 48, generator=draw), torch.randn(count, generator=draw)
    groups = [
        Group(prompt=p, samples=tuple(range(i * group, (i + 1) * group)), numbers=tuple(range(group)))
        for i, p in enumerate(prompts)
    ]
    noise = PointNoise(seed=1, step=0, shared=True)
    return [
        forward_points(part, latents, advantages, adapter.times(6), STEPS, torch.ones(6), noise, count * len(STEPS))
        for alike in by_layout(adapter, prompts)
        for part in pieces([groups[row] for row in alike], len(STEPS), limit)
    ]


def gradients(learner: Learner, batches: list[MicroBatch]) -> dict[str, Tensor]:
    for i, batch in enumerate(batches):
        learner.accumulate(batch, Tally(), last=i == len(batches) - 1)
    found = dict(learner.engine.gradients())
    learner.engine.zero_grad()
    return found


def differ(learner: Learner, *names: str) -> None:
    """Move the weight sets away from the current weights."""
    for i, name in enumerate(names):
        moved = {key: value + 0.01 * (i + 1) for key, value in learner.policy.weights().items()}
        learner.policy.put(name, moved, what=name)


@pytest.mark.parametrize("objective", [NFT(), AWM(), SFT()])
def test_the_gradient_does_not_depend_on_the_micro_batches(
    objective: Any, learner: Make, adapter: TinyWorldAdapter, drawings: Make, edits: Make
) -> None:
    learn = learner(objective)
    differ(learn, "old", "reference")
    prompts = [*drawings(2), *edits(1)]
    large, small = (micro_batches(adapter, prompts, limit) for limit in (100, 6))
    assert (len(large), len(small)) == (2, 6)  # groups of three samples are split in 2 and 1
    whole, parts = gradients(learn, large), gradients(learn, small)
    size = max(float(g.abs().max()) for g in whole.values())
    assert size > 1e-4
    for name, gradient in whole.items():  # fp32 sums in another order
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=2e-5 * size, msg=name)


def test_the_old_velocity_is_not_evaluated_where_it_equals_the_current_one(
    learner: Make, net: nn.Module, adapter: TinyWorldAdapter, drawings: Make, forwards: Make
) -> None:
    learn, rows, tally = learner(NFT()), forwards(net), Tally()
    (batch,) = micro_batches(adapter, drawings(2), 100)
    velocity = learn.velocities(batch, tally)
    assert rows == [18]
    assert (tally.gradient_rows, tally.forward_rows) == (18, 0)
    assert velocity.keys() == {Role.CURRENT, Role.OLD, Role.REFERENCE}
    assert torch.equal(velocity[Role.OLD], velocity[Role.CURRENT])
    assert [role for role, v in velocity.items() if v.requires_grad] == [Role.CURRENT]


def test_each_role_that_differs_takes_a_forward_of_its_own(
    learner: Make, net: nn.Module, adapter: TinyWorldAdapter, drawings: Make, forwards: Make
) -> None:
    learn, rows = learner(NFT()), forwards(net)
    (batch,) = micro_batches(adapter, drawings(1), 100)
    differ(learn, "old")
    old_only = Tally()
    velocity = learn.velocities(batch, old_only)
    assert (rows, old_only.forward_rows, old_only.gradient_rows) == ([9, 9], 9, 9)
    assert not torch.equal(velocity[Role.OLD], velocity[Role.CURRENT])
    assert torch.equal(velocity[Role.REFERENCE], velocity[Role.CURRENT])
    rows.clear()
    differ(learn, "old", "reference")
    learn.velocities(batch, Tally())
    assert rows == [9, 9, 9]


def test_a_role_the_options_do_not_need_is_not_evaluated(
    learner: Make, net: nn.Module, adapter: TinyWorldAdapter, drawings: Make, forwards: Make
) -> None:
    learn, rows = learner(NFT(NFTOptions(kl=0))), forwards(net)
    differ(learn, "old", "reference")
    (batch,) = micro_batches(adapter, drawings(1), 100)
    assert learn.velocities(batch, Tally()).keys() == {Role.CURRENT, Role.OLD}
    assert rows == [9, 9]


def test_the_velocity_of_a_role_is_that_of_its_weights(
    learner: Make, adapter: TinyWorldAdapter, drawings: Make
) -> None:
    learn = learner(NFT())
    differ(learn, "old", "reference")
    (batch,) = micro_batches(adapter, drawings(2), 100)
    velocity = learn.velocities(batch, Tally())
    for role, name in ((Role.OLD, "old"), (Role.REFERENCE, "reference"), (Role.CURRENT, "current")):
        with learn.policy.wearing(name) as worn:
            alone = adapter.velocity(worn, batch.points.x, batch.points.t, adapter.encode(batch.prompts), batch.rows)
        torch.testing.assert_close(velocity[role].detach(), alone, rtol=0, atol=1e-6)


def test_several_timesteps_of_all_samples_share_one_forward(
    learner: Make, net: nn.Module, adapter: TinyWorldAdapter, drawings: Make, forwards: Make
) -> None:
    learn, rows = learner(NFT()), forwards(net)
    tally = learn.learn(micro_batches(adapter, drawings(2), 100))
    assert rows == [2 * 3 * len(STEPS)]
    assert tally.gradient_rows == 18


def test_hybrid_guidance_trains_on_the_conditional_branch_alone(
    learner: Make, net: nn.Module, adapter: TinyWorldAdapter, drawings: Make, forwards: Make
) -> None:
    rows = forwards(net)
    (batch,) = micro_batches(adapter, drawings(2), 100)
    learner(NFT(), RolloutOnly(ScaleOptions(scale=4))).velocities(batch, Tally())
    assert rows == [18]
    rows.clear()
    learner(NFT(), Both(ScaleOptions(scale=4))).velocities(batch, Tally())
    assert rows == [36]


def test_a_teacher_of_equal_weights_under_other_guidance_is_evaluated(
    learner: Make, net: nn.Module, adapter: TinyWorldAdapter, drawings: Make, forwards: Make
) -> None:
    learn = learner(VelocityMatch(), TeacherOnly(ScaleOptions(scale=3)))
    learn.policy.remember("teacher/t2i")
    (batch,) = micro_batches(adapter, drawings(1), 100)
    rows = forwards(net)
    velocity = learn.velocities(replace(batch, teacher="teacher/t2i"), Tally())
    assert rows == [18, 9]
    points, cond, null = batch.points, adapter.encode(batch.prompts), adapter.null(batch.prompts)
    with torch.no_grad():
        own, without = (adapter.velocity(net, points.x, points.t, c, batch.rows) for c in (cond, null))
    torch.testing.assert_close(velocity[Role.TEACHER], without + 3 * (own - without), rtol=0, atol=1e-5)
    torch.testing.assert_close(velocity[Role.CURRENT].detach(), own, rtol=0, atol=1e-5)


def test_without_a_teacher_there_is_nobody_to_ask(learner: Make, adapter: TinyWorldAdapter, drawings: Make) -> None:
    (batch,) = micro_batches(adapter, drawings(1), 100)
    with pytest.raises(ValueError, match="teacher"):
        learner(VelocityMatch()).velocities(batch, Tally())


def test_each_micro_batch_asks_its_own_teacher(learner: Make, adapter: TinyWorldAdapter, drawings: Make) -> None:
    """The student equals one of two teachers: what is left of the loss is its distance to the other."""
    learn = learner(VelocityMatch())
    learn.policy.remember("teacher/a")
    differ(learn, "teacher/b")
    (batch,) = micro_batches(adapter, drawings(1), 100)
    half = replace(batch, points=replace(batch.points, weight=batch.points.weight / 2))
    alone = Tally()
    learn.accumulate(replace(batch, teacher="teacher/b"), alone, last=True)
    learn.engine.zero_grad()
    both = Tally()
    for name in ("teacher/a", "teacher/b"):
        learn.accumulate(replace(half, teacher=name), both, last=name == "teacher/b")
    learn.engine.zero_grad()
    assert alone.metrics["loss"] > 0
    assert both.metrics["loss"] == pytest.approx(alone.metrics["loss"] / 2, rel=1e-5)


def test_an_update_moves_the_current_weights_and_leaves_the_others(
    learner: Make, adapter: TinyWorldAdapter, drawings: Make
) -> None:
    learn = learner(NFT())
    before = {name: value.clone() for name, value in learn.policy.weights().items()}
    tally = learn.learn(micro_batches(adapter, drawings(2), 9))
    assert tally.metrics["updated"] == 1
    assert tally.metrics["grad_norm"] > 0
    assert not learn.policy.same("old", "current")
    assert all(torch.equal(learn.policy.sets["old"][name], value) for name, value in before.items())
    assert any(not torch.equal(learn.policy.weights()[name], value) for name, value in before.items())


def test_metrics_do_not_depend_on_the_micro_batches(learner: Make, adapter: TinyWorldAdapter, drawings: Make) -> None:
    learn = learner(NFT())
    differ(learn, "old", "reference")
    tallies = []
    for limit in (100, 9):
        tally = Tally()
        batches = micro_batches(adapter, drawings(2), limit)
        for i, batch in enumerate(batches):
            learn.accumulate(batch, tally, last=i == len(batches) - 1)
        learn.engine.zero_grad()
        tallies.append(tally.metrics)
    assert tallies[0].keys() == tallies[1].keys()
    assert tallies[0] == pytest.approx(tallies[1], rel=1e-4)


def test_the_old_policy_and_the_average_follow_each_at_its_own_pace(learner: Make) -> None:
    slow = Term(objective=EmaKL(EmaKLOptions(decay_rate=0.02, decay_max=0.9)), weight=1.0, at="plus.0")
    learn: Learner = learner(Summed(NFT(NFTOptions(old_decay_rate=0.05)), [slow]))
    learn.policy.remember("ema")
    name = next(iter(learn.policy.weights()))
    before = learn.policy.weights()[name].clone()
    with torch.no_grad():
        learn.policy.parameters[name].add_(1)
    learn.policy.changed()
    learn.follow(5)
    torch.testing.assert_close(learn.policy.sets["old"][name] - before, torch.full_like(before, 1 - 0.05 * 5))
    torch.testing.assert_close(learn.policy.sets["ema"][name] - before, torch.full_like(before, 1 - 0.02 * 5))
    torch.testing.assert_close(learn.policy.sets["reference"][name], before)


def test_a_metric_by_time_is_the_weighted_mean_of_its_quarter_whose_upper_end_is_part_of_it() -> None:
    t, weight = torch.tensor([0.0, 0.25, 0.26, 0.5, 1.0, 1.0]), torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 3.0])
    zeros, values = torch.zeros(6), torch.tensor([4.0, 8.0, 1.0, 3.0, 0.0, 4.0])
    halves = [Tally(), Tally()]
    for own, tally in zip((slice(0, 3), slice(3, 6)), halves, strict=True):
        where = Points(x=zeros[own], t=t[own], advantage=zeros[own], weight=weight[own])
        tally.observe("kl", values[own], where)
    whole = Tally()
    for tally in halves:
        whole.include(tally, 1.0)
    assert whole.reported == pytest.approx({"kl/0.00-0.25": 7.0, "kl/0.25-0.50": 2.0, "kl/0.75-1.00": 3.0})


def test_zero_advantage_leaves_the_rest_of_the_points_alone(adapter: TinyWorldAdapter, drawings: Make) -> None:
    (batch,) = micro_batches(adapter, drawings(1), 100)
    flat = with_zero_advantage(batch)
    assert not flat.points.advantage.any()
    assert flat.points.x is batch.points.x


def test_a_set_comes_to_the_device_once_for_all_micro_batches(
    learner: Make, adapter: TinyWorldAdapter, drawings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn: Learner = learner(NFT())
    differ(learn, "old", "reference")
    brought: list[str] = []
    original = Policy.on_device

    @contextmanager
    def counted(policy: Policy, name: str, device: torch.device) -> Iterator[None]:
        brought.append(name)
        with original(policy, name, device):
            yield

    monkeypatch.setattr(Policy, "on_device", counted)
    batches = micro_batches(adapter, drawings(4), 9)
    tally = learn.learn(batches)
    assert len(batches) == 4
    assert brought == ["old", "reference"]
    assert (tally.forward_rows, tally.gradient_rows) == (2 * 36, 36)
