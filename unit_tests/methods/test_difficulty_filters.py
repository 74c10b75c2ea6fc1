"""Prompts whose samples all score the same, and prompts that are too easy or too hard."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from velatura.api import Prompt, PromptFilter, RewardReport, Status
from velatura.rewards.difficulty import DifficultyBand, DifficultyBandOptions, ZeroVariance, ZeroVarianceOptions

F = None
"""A score that failed."""


def report(groups: list[list[float | None]], offset: float = 0.0) -> RewardReport:
    flat = [value for group in groups for value in group]
    status = [Status.OK if value is not None else Status.FAILED for value in flat]
    return RewardReport(
        names=("reward",),
        scores=torch.tensor([[0.0 if value is None else value + offset] for value in flat]),
        status=torch.tensor([[int(one)] for one in status]),
        weight=torch.ones(len(flat), 1),
        group=torch.tensor([p for p, group in enumerate(groups) for _ in group]),
        prompts=tuple(Prompt(id=str(p), text="a cat", task="t2i") for p in range(len(groups))),
    )


def test_groups_without_variance_are_dropped_and_the_statistic_is_the_standard_deviation() -> None:
    decided = ZeroVariance().admit(report([[1, 1, 1, 1], [0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [2, 2, F, 3]]))
    assert decided.keep.tolist() == [False, True, False, True]
    assert decided.state == ("flat", "active", "flat", "active")
    expected = [0.0, torch.tensor([0.0, 0, 0, 1]).std(), 0.0, torch.tensor([2.0, 2, 3]).std()]
    torch.testing.assert_close(decided.statistic, torch.tensor(expected))
    assert "every sample scores the same" in decided.reason[0]


def test_a_tolerance_counts_rounding_as_nothing() -> None:
    groups = [[0.5, 0.5 + 1e-6, 0.5], [0.5, 0.6, 0.5]]
    assert ZeroVariance().admit(report(groups)).keep.tolist() == [True, True]
    assert ZeroVariance(ZeroVarianceOptions(tolerance=1e-3)).admit(report(groups)).keep.tolist() == [False, True]


@pytest.mark.parametrize("sieve", [ZeroVariance(), DifficultyBand()], ids=lambda sieve: sieve.name)
@pytest.mark.parametrize("group", [[F, F, F, F], [0.5, F, F, F]])
def test_a_prompt_without_scores_is_neither_kept_nor_called_easy(
    sieve: PromptFilter,  # type: ignore[type-arg]
    group: list[float | None],
) -> None:
    decided = sieve.admit(report([group, [0.2, 0.4, 0.4, 0.6]]))
    assert decided.keep.tolist() == [False, True]
    assert decided.state == ("failed", "active")
    assert decided.statistic[0].isnan() and not decided.statistic[1].isnan()
    assert decided.threshold is None or decided.threshold[0].isnan()
    assert decided.reason[0].startswith("too few valid scores")


def test_the_band_keeps_what_is_neither_solved_nor_too_hard() -> None:
    decided = DifficultyBand().admit(report([[0.95, 0.97], [0.0, 0.02], [0.0, 1.0], [0.1, 0.1], [0.9, 0.9]]))
    assert decided.state == ("solved", "too_hard", "active", "active", "active")
    torch.testing.assert_close(decided.statistic, torch.tensor([0.96, 0.01, 0.5, 0.1, 0.9]))


def test_with_a_mark_to_pass_the_band_is_one_of_pass_rates() -> None:
    groups = [[7.0, 8, 9, 7], [1.0, 2, 3, 4], [1.0, 9, 9, 1], [7.0, 1, 1, 1], [7.0, 7, 7, 1]]
    band = DifficultyBand(DifficultyBandOptions(pass_at=7, low=0.25, high=0.75))
    decided = band.admit(report(groups))
    assert decided.statistic.tolist() == [1.0, 0.0, 0.5, 0.25, 0.75]
    assert decided.state == ("solved", "too_hard", "active", "active", "active")  # both ends are within
    assert "pass rate 1 > 0.75" in decided.reason[0]


def test_the_spread_does_not_depend_on_the_scale_s_origin_and_the_band_does() -> None:
    groups = [[0.2, 0.4, 0.6], [0.5, 0.5, 0.5]]
    near, far = (ZeroVariance().admit(report(groups, offset)) for offset in (0.0, 4.0))
    assert near.keep.tolist() == far.keep.tolist() == [True, False]
    assert DifficultyBand().admit(report(groups, 4.0)).state == ("solved", "solved")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"low": 0.9, "high": 0.1}, "low 0.9 is not below high 0.1"),
        ({"low": 2.0, "high": 5.0, "pass_at": 3}, "the band is one of shares"),
        ({"min_valid": 0}, "greater than 0"),
    ],
)
def test_bands_that_hold_nothing_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DifficultyBandOptions.model_validate(wrong)
