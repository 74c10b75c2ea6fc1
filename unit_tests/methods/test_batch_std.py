"""`gdpo` and `group-mean-global-std` by hand; degenerate groups under every estimator that divides by a spread."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from velatura.api import AdvantageEstimator, Prompt, RewardReport, Status
from velatura.rewards.advantages import GroupZ, GroupZOptions, RankNormal, WinRate
from velatura.rewards.batch_std import Gdpo, GdpoOptions, GlobalStdOptions, GroupMeanGlobalStd
from velatura.rewards.reliability import PooledStd

P, G = 3, 6
EVERY = [GroupZ(), Gdpo(), GroupMeanGlobalStd(), PooledStd(), RankNormal(), WinRate()]


def report(scores: Tensor, group: int = G, weight: tuple[float, ...] = (0.7, 0.3)) -> RewardReport:
    count = len(scores) // group
    return RewardReport(
        names=tuple(f"r{k}" for k in range(scores.shape[1])), scores=scores.float(),
        status=torch.zeros(scores.shape, dtype=torch.int64),
        weight=torch.tensor(weight[: scores.shape[1]]).expand(scores.shape).clone(),
        group=torch.arange(count).repeat_interleave(group),
        prompts=tuple(Prompt(id=str(p), text="a cat", task="t2i") for p in range(count)),
    )  # fmt: skip


def draw(rewards: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(P * G, rewards, generator=torch.Generator().manual_seed(seed)).double()


def test_gdpo_is_the_sum_of_z_scores_over_its_spread_in_the_batch() -> None:
    scores = draw().float().double()
    grouped = scores.reshape(P, G, 2)
    z = (grouped - grouped.mean(1, keepdim=True)) / grouped.std(1, keepdim=True, correction=0)
    sums = (z * torch.tensor([0.7, 0.3]).double()).sum(2).flatten()
    found = Gdpo(GdpoOptions(clip=None)).estimate(report(scores))
    torch.testing.assert_close(found.values, (sums / sums.std(correction=0)).float(), atol=1e-6, rtol=1e-5)
    assert float(found.values.double().std(correction=0)) == pytest.approx(1, abs=1e-6)
    paper = GroupZ(GroupZOptions(std_floor=0, clip=None)).estimate(report(scores)).values
    torch.testing.assert_close(found.values / found.values.norm(), paper / paper.norm(), atol=1e-6, rtol=1e-5)


def test_of_one_reward_without_ties_gdpo_is_group_z() -> None:
    one, other = (kind.estimate(report(draw(1))).values for kind in (Gdpo(), GroupZ()))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_global_std_is_that_of_the_composite_over_all_prompts() -> None:
    scores = draw().float().double() + torch.arange(P).repeat_interleave(G)[:, None]  # prompts of other difficulty
    composite = (scores * torch.tensor([0.7, 0.3]).double()).sum(1)
    centred = composite - composite.reshape(P, G).mean(1).repeat_interleave(G)
    found = GroupMeanGlobalStd(GlobalStdOptions(clip=None)).estimate(report(scores)).values
    torch.testing.assert_close(found, (centred / (composite.std(correction=0) + 1e-4)).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.name)
def test_groups_that_cannot_be_compared_give_no_advantage(kind: AdvantageEstimator) -> None:  # type: ignore[type-arg]
    constant = type(kind)(kind.options).estimate(report(torch.full((P * G, 1), 0.3), weight=(1.0,)))
    assert constant.valid.all() and torch.equal(constant.values, torch.zeros(P * G))
    alone = type(kind)(kind.options).estimate(report(draw(1), group=1, weight=(1.0,)))
    assert not alone.valid.any() and torch.equal(alone.values, torch.zeros(P * G))
    mixed = draw(1)
    mixed[:G] = 0.5
    some = type(kind)(kind.options).estimate(report(mixed, weight=(1.0,)))
    assert torch.equal(some.values[:G], torch.zeros(G)) and bool((some.values[G:] != 0).all())


@pytest.mark.parametrize("passed", [1, 3, 5])
def test_binary_rewards_have_the_advantage_of_their_pass_rate(passed: int) -> None:
    scores = torch.zeros(P * G, 1)
    for p in range(P):
        scores[p * G : p * G + passed] = 1
    rate = passed / G
    values = GroupZ(GroupZOptions(clip=None)).estimate(report(scores, weight=(1.0,))).values.reshape(P, G)
    torch.testing.assert_close(values[:, :passed], torch.full((P, passed), ((1 - rate) / rate) ** 0.5))
    torch.testing.assert_close(values[:, passed:], torch.full((P, G - passed), -((rate / (1 - rate)) ** 0.5)))
    for kind in EVERY:
        found = type(kind)(kind.options).estimate(report(scores, weight=(1.0,))).values.reshape(P, G)
        assert found.isfinite().all() and (found[:, 0] > 0).all() and (found[:, -1] < 0).all()


@pytest.mark.parametrize("kind", [Gdpo(), GroupMeanGlobalStd()], ids=lambda kind: kind.name)
def test_a_failed_score_enters_no_spread_whatever_number_it_carries(kind: AdvantageEstimator) -> None:  # type: ignore[type-arg]
    base = report(draw())
    status = base.status.clone()
    status[2] = int(Status.FAILED)
    found = []
    for garbage in (0.0, 1e6):
        scores = base.scores.clone()
        scores[2] = garbage
        found.append(kind.estimate(replace(base, scores=scores, status=status)))
    assert torch.equal(found[0].values, found[1].values) and not found[0].valid[2]
