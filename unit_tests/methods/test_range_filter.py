"""The range filter: thresholds, categories, missing scores, reasons."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from velatura.api import Prompt, RewardReport, Status
from velatura.rewards.filters import Range, RangeOptions

G = 8


def report(ranges: list[float], categories: list[str] | None = None, offset: float = 0.0) -> RewardReport:
    """One reward; prompt p's samples run evenly from `offset` to `offset + ranges[p]`."""
    names = categories or ["general"] * len(ranges)
    scores = torch.cat([offset + torch.linspace(0, r, G) for r in ranges])[:, None]
    return RewardReport(
        names=("reward",),
        scores=scores,
        status=torch.zeros_like(scores, dtype=torch.int64),
        weight=torch.ones_like(scores),
        group=torch.arange(len(ranges)).repeat_interleave(G),
        prompts=tuple(Prompt(id=str(p), text="a cat", task="t2i", category=c) for p, c in enumerate(names)),
    )


def absolute(threshold: float) -> Range:
    return Range(RangeOptions(threshold=threshold, quantile=None))


def failed(base: RewardReport, rows: list[int], value: float = 99.0) -> RewardReport:
    scores, status = base.scores.clone(), base.status.clone()
    scores[rows], status[rows] = value, int(Status.FAILED)
    return replace(base, scores=scores, status=status)


def test_a_threshold_keeps_wide_prompts_and_says_why() -> None:
    admission = absolute(0.25).admit(report([0.12, 0.41, 0.25]))
    assert admission.keep.tolist() == [False, True, True]
    assert admission.reason == ("range 0.12 < 0.25", "kept: range 0.41", "kept: range 0.25")
    torch.testing.assert_close(admission.statistic, torch.tensor([0.12, 0.41, 0.25]))


def test_a_quantile_drops_the_lowest_share_of_each_category() -> None:
    low, high = [0.01 * i for i in range(1, 11)], [10.0 * i for i in range(1, 11)]
    admission = Range(RangeOptions(quantile=0.3)).admit(report(low + high, ["a"] * 10 + ["b"] * 10))
    assert admission.keep.tolist() == ([False] * 3 + [True] * 7) * 2
    assert admission.reason[10] == "range 10 < 40"


def test_a_quantile_of_a_tiny_category_drops_nobody() -> None:
    assert Range(RangeOptions(quantile=0.3)).admit(report([0.1, 0.2, 0.3])).keep.all()


def test_a_quantile_does_not_depend_on_the_scale_of_the_reward() -> None:
    ranges = [0.4, 0.1, 0.3, 0.2, 0.5]
    small, large = (Range().admit(report([s * r for r in ranges])).keep for s in (1e-3, 1e3))
    assert torch.equal(small, large)


@pytest.mark.parametrize(("threshold", "kept"), [(0.05, 7), (0.75, 3)])
def test_of_two_thresholds_the_larger_one_decides(threshold: float, kept: int) -> None:
    ranges = [0.1 * i for i in range(1, 11)]
    admission = Range(RangeOptions(threshold=threshold, quantile=0.3)).admit(report(ranges))
    assert admission.keep.sum() == kept


def test_prompts_of_equal_range_share_their_fate() -> None:
    assert Range(RangeOptions(quantile=0.3)).admit(report([0.5] * 10)).keep.all()


def test_a_prompt_without_any_range_is_dropped_at_every_threshold() -> None:
    admission = absolute(0.0).admit(report([0.0, 0.1], offset=1 / 3))
    assert admission.keep.tolist() == [False, True]
    assert admission.reason[0] == "range 0: every sample scores the same"


def test_too_few_valid_scores_are_a_reason_of_their_own() -> None:
    admission = absolute(0.1).admit(failed(report([1.0, 1.0]), [0, 1, 2, 3, 4]))
    assert admission.keep.tolist() == [False, True]
    assert admission.reason[0] == "too few valid scores (3 of 8)"
    assert admission.statistic[0].isnan()


@pytest.mark.parametrize("garbage", [0.0, 1e9, float("nan")])
def test_a_failed_score_does_not_widen_a_range(garbage: float) -> None:
    admission = absolute(0.5).admit(failed(report([0.4, 0.6]), [3, 12], garbage))
    assert admission.keep.tolist() == [False, True]
    torch.testing.assert_close(admission.statistic, torch.tensor([0.4, 0.6]))


def test_prompts_without_a_range_do_not_count_in_the_quantile() -> None:
    ranges = [0.1 * i for i in range(1, 11)]
    admission = Range(RangeOptions(quantile=0.5)).admit(failed(report([*ranges, 9.0]), list(range(80, 88))))
    assert admission.keep.tolist() == [False] * 5 + [True] * 5 + [False]


def test_the_range_is_that_of_the_composite() -> None:
    """Two rewards that cancel: each varies, the composite hardly does."""
    up = torch.linspace(0, 1, G)
    base = report([0.0])
    both = replace(
        base,
        names=("one", "two"),
        scores=torch.stack([up, 0.9 - 0.9 * up], 1),
        status=torch.zeros(G, 2, dtype=torch.int64),
        weight=torch.ones(G, 2),
    )
    torch.testing.assert_close(absolute(0.1).admit(both).statistic, torch.tensor([0.05]))


def test_a_filter_without_any_threshold_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs a threshold, a quantile, or both"):
        RangeOptions(threshold=None, quantile=None)


def test_decisions_do_not_depend_on_the_order_of_samples() -> None:
    base = report([0.1, 0.5, 0.3, 0.2])
    order = torch.randperm(4 * G, generator=torch.Generator().manual_seed(0))
    mixed = replace(base, scores=base.scores[order], group=base.group[order])
    first, second = Range().admit(base), Range().admit(mixed)
    assert torch.equal(first.keep, second.keep) and first.reason == second.reason
