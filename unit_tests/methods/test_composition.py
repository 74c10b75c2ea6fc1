"""Caps, vetoes, ranks, win rates: what comes before and after the comparison within a group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from velatura.api import Prompt, RewardReport, Status
from velatura.rewards.advantages import (
    GroupZ,
    GroupZOptions,
    RankNormal,
    RawSum,
    RawSumOptions,
    WinRate,
    WinRateOptions,
)
from velatura.rewards.composition import CompositionOptions, TierCap, geometric, soft_minimum, tier_capped
from velatura.rewards.reliability import PooledStd, ReliabilityZ, ReliabilityZOptions

NAMES = ("alignment", "aesthetics", "portrait")


def report(scores: list[list[float]] | Tensor, group: list[int], weight: tuple[float, ...] | None = None) -> Any:
    values = torch.as_tensor(scores, dtype=torch.float32)
    weights = weight or (1.0,) * values.shape[1]
    return RewardReport(
        names=NAMES[: values.shape[1]],
        scores=values,
        status=torch.zeros_like(values, dtype=torch.int64),
        weight=torch.tensor(weights).expand(len(values), -1).contiguous(),
        group=torch.tensor(group),
        prompts=tuple(Prompt(id=str(p), text="a cat", task="t2i") for p in range(max(group) + 1)),
    )


def missing(base: RewardReport, row: int, reward: int, status: Status = Status.FAILED) -> RewardReport:
    scores, statuses = base.scores.clone(), base.status.clone()
    scores[row, reward], statuses[row, reward] = 1e9, int(status)
    return replace(base, scores=scores, status=statuses)


EVERY = {
    "group-z": GroupZ(),
    "raw-sum": RawSum(),
    "rank-normal": RankNormal(),
    "winrate": WinRate(),
    "pooled-std": PooledStd(),
    "reliability-z": ReliabilityZ(ReliabilityZOptions(noise=dict.fromkeys(NAMES, 0.1))),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("status", [Status.FAILED, Status.REFUSED, Status.NOT_APPLICABLE])
def test_a_missing_score_is_never_a_number(name: str, status: Status) -> None:
    scores = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for garbage in (0.0, 1e30, math.nan):
        base = missing(report(scores, [0] * 8 + [1] * 8), 3, 0, status)
        base.scores[3, 0] = garbage
        found.append(type(EVERY[name])(EVERY[name].options).estimate(base))
    for other in found[1:]:
        assert torch.equal(other.values, found[0].values)
        assert other.metrics == found[0].metrics
    assert bool(torch.isfinite(found[0].values).all())
    alone = type(EVERY[name])(EVERY[name].options).estimate(missing(report(scores[:, :1], [0] * 8 + [1] * 8), 3, 0))
    assert alone.values[3] == 0 and not alone.valid[3]


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_alone_in_its_group_and_a_constant_group_teach_nothing(name: str) -> None:
    scores = [[0.3], [0.7], [0.1], [0.9], [0.5], [0.5], [0.5]]
    made = type(EVERY[name])(EVERY[name].options).estimate(report(scores, [0, 0, 0, 1, 2, 2, 2]))
    assert made.values[3] == 0 and not made.valid[3]
    assert made.values[4:].tolist() == [0, 0, 0]
    assert made.values[1] > made.values[0] > made.values[2]
    assert abs(float(made.values[:3].sum())) < 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_more_of_a_reward_is_never_worse(name: str) -> None:
    values = torch.randn(8, 1, generator=torch.Generator().manual_seed(2))
    made = type(EVERY[name])(EVERY[name].options).estimate(report(values, [0] * 8)).values
    assert torch.equal(made.argsort(), values[:, 0].argsort())


def test_the_raw_sum_is_the_weighted_mean_less_that_of_the_group() -> None:
    made = RawSum().estimate(report([[1, 10], [3, 20], [5, 60]], [0, 0, 0], (1, 3)))
    torch.testing.assert_close(made.values, torch.tensor([(-2 - 60) / 4, (0 - 30) / 4, (2 + 90) / 4]))


def test_a_raw_sum_may_be_clipped() -> None:
    made = RawSum(RawSumOptions(clip=1.5)).estimate(report([[0], [0], [9]], [0, 0, 0]))
    assert made.values.tolist() == [-1.5, -1.5, 1.5]


def test_normal_scores_are_those_of_the_ranks_and_ties_share_theirs() -> None:
    made = RankNormal().estimate(report([[0.1], [5000.0], [0.1], [0.2]], [0] * 4))
    expected = [torch.special.ndtri(torch.tensor((rank - 0.375) / 4.25, dtype=torch.float64)) for rank in (1.5, 4, 3)]
    torch.testing.assert_close(made.values[[0, 1, 3]].double(), torch.stack(expected), atol=1e-6, rtol=0)
    assert made.values[0] == made.values[2]


def test_only_the_order_matters_to_normal_scores_and_win_rates() -> None:
    values = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    group = [0] * 8 + [1] * 8
    for estimator in (RankNormal(), WinRate()):
        first, bent = (estimator.estimate(report(v, group)).values for v in (values, values.exp() * 40 - 3))
        assert torch.equal(first, bent)


def test_win_rates_against_counting() -> None:
    draw = torch.Generator().manual_seed(3)
    values = torch.randint(0, 5, (12, 1), generator=draw).float()
    group = [0] * 5 + [1] * 7
    made = WinRate(WinRateOptions(margin=1.0)).estimate(report(values, group)).values.tolist()
    for i in range(12):
        others = [j for j in range(12) if group[j] == group[i] and j != i]
        gaps = [float(values[i] - values[j]) for j in others]
        expected = (sum(gap > 1 for gap in gaps) - sum(gap < -1 for gap in gaps)) / len(gaps)
        assert made[i] == pytest.approx(expected, abs=1e-6)


def test_a_failed_score_takes_no_part_in_a_contest() -> None:
    base = missing(report([[1.0], [2.0], [3.0], [4.0], [9.0]], [0] * 5), 4, 0)
    made = WinRate().estimate(base)
    torch.testing.assert_close(made.values, torch.tensor([-1, -1 / 3, 1 / 3, 1, 0]))


def capped(scores: list[list[float]], **cap: float) -> list[list[float]]:
    base = report(scores, [0] * len(scores))
    return tier_capped(base, NAMES, TierCap(**cap)).scores.tolist()


def test_a_low_score_of_an_earlier_tier_caps_the_later_ones() -> None:
    found = capped([[2.0, 5.0, 4.0], [2.5, 5.0, 2.0], [3.0, 5.0, 5.0], [5.0, 1.0, 5.0]])
    assert found == [[2.0, 1.0, 1.0], [2.5, 3.0, 2.0], [3.0, 5.0, 5.0], [5.0, 1.0, 1.0]]


def test_the_cap_has_the_scale_it_is_given() -> None:
    found = capped([[0.3, 0.9, 0.9]], none_below=0.2, all_above=0.6, lowest=0.0, highest=1.0)
    assert found[0] == pytest.approx([0.3, 0.25, 0.25])


def test_a_tier_that_does_not_apply_caps_nothing_and_one_that_failed_hides_what_it_would_have_capped() -> None:
    base = report([[1.0, 4.0, 5.0], [1.0, 4.0, 5.0]], [0, 0])
    base = missing(missing(base, 0, 0, Status.NOT_APPLICABLE), 1, 0, Status.FAILED)
    found = tier_capped(base, NAMES, TierCap())
    assert found.scores[0, 1:].tolist() == [4.0, 5.0] and found.valid[0, 1:].all()
    assert not found.valid[1].any()


def test_caps_come_before_the_comparison() -> None:
    scores = [[1.0, 5.0], [5.0, 3.0], [5.0, 1.0], [5.0, 2.0]]
    options = GroupZOptions(tiers=["alignment", "aesthetics"], std_floor=0)
    made = GroupZ(options).estimate(report(scores, [0] * 4, (0.001, 1.0))).values
    assert made[0] < made[1] and float(made[0]) == pytest.approx(float(made[2]), abs=2e-2)
    assert GroupZ().estimate(report(scores, [0] * 4, (0.001, 1.0))).values.argmax() == 0


def test_a_vetoed_sample_is_one_pooled_std_below_the_worst_of_its_group() -> None:
    scores = [[0.0, 1.0], [2.0, 1.0], [4.0, 0.1], [6.0, 1.0], [0.0, 1.0], [2.0, 1.0]]
    base = report(scores, [0] * 4 + [1] * 2, (1.0, 0.0))  # the veto has no weight
    options = GroupZOptions(std_floor=0, veto={"aesthetics": 0.5})
    made = GroupZ(options).estimate(base)
    z = [value / math.sqrt(5) for value in (-3, -1, 1, 3)]
    bottom = z[0] - 1  # z-scores have a pooled std of 1
    mean = (z[0] + z[1] + bottom + z[3]) / 4
    expected = torch.tensor([z[0] - mean, z[1] - mean, bottom - mean, z[3] - mean, -1, 1])
    torch.testing.assert_close(made.values, expected)
    assert made.metrics["vetoed_samples"] == pytest.approx(1 / 6)


def test_a_veto_that_could_not_be_judged_leaves_the_sample_out() -> None:
    base = missing(report([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]], [0] * 3, (1.0, 0.0)), 1, 1)
    made = GroupZ(GroupZOptions(veto={"aesthetics": 0.5})).estimate(base)
    assert made.valid.tolist() == [True, False, True] and made.values[1] == 0


def test_a_group_in_which_all_are_vetoed_teaches_nothing() -> None:
    base = report([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]], [0] * 3, (1.0, 0.0))
    assert GroupZ(GroupZOptions(veto={"aesthetics": 0.5})).estimate(base).values.tolist() == [0, 0, 0]


def test_soft_minima_lie_between_the_minimum_and_the_mean() -> None:
    scores = torch.tensor([[0.2, 0.9, 0.6]], dtype=torch.float64)
    weight = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    expected = -math.log(sum(w * math.exp(-4 * x) for w, x in zip(weight[0], scores[0], strict=True))) / 4
    assert float(soft_minimum(scores, weight, 4.0)) == pytest.approx(expected)
    assert float(soft_minimum(scores, weight, 1e4)) == pytest.approx(0.2, abs=1e-3)
    assert float(soft_minimum(scores, weight, 1e-6)) == pytest.approx(0.475, abs=1e-5)
    without = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    assert float(soft_minimum(scores, without, 1e4)) == pytest.approx(0.6, abs=1e-3)


def test_a_geometric_mean_has_a_floor() -> None:
    scores = torch.tensor([[0.25, 1.0], [0.0, 1.0]], dtype=torch.float64)
    weight = torch.full((2, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(geometric(scores, weight, 0.01), torch.tensor([0.5, 0.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tiers": ["alignment"]}, "one tier, 'alignment', caps nothing"),
        ({"tiers": ["a", "b", "a"]}, "'a' is named twice"),
        ({"tier_cap": {"none_below": 3, "all_above": 3}}, "none_below < all_above"),
        ({"clip": 0}, "greater than 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CompositionOptions.model_validate(options)


@pytest.mark.parametrize("name", EVERY)
def test_a_misspelt_tier_is_answered_with_the_nearest(name: str) -> None:
    kind, weights = type(EVERY[name]), dict.fromkeys(NAMES, 1.0)
    for option in ({"tiers": ["alignment", "portrai"]}, {"veto": {"portrai": 0.5}}):
        made = kind(kind.options_class.model_validate(EVERY[name].options.model_dump() | option))
        assert "Did you mean 'portrait'?" in made.complaint(weights, calibrated=False)
    assert EVERY[name].complaint(weights, calibrated=False) == ""
