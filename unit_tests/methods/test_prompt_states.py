"""The range filter's noise threshold and states, confirmation, and the ledger of a policy in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from velatura.api import Admission, Prompt, RewardReport, Status, VelaturaError
from velatura.core.ledger import read_rows, rows_of, states_by_category, write_rows
from velatura.core.spread import expected_range, noise_range
from velatura.core.stages.curate import by_pass, confirmation
from velatura.core.training_ledger import TrainingLedger, admission_metrics
from velatura.rewards.filters import Range, RangeOptions
from velatura.rewards.noise import noise_of

G = 8


def report(
    scores: Tensor, names: Sequence[str] = ("a",), weights: Sequence[float] = (1.0,), **more: Any
) -> RewardReport:
    """`scores` [P G R]."""
    count, group, rewards = scores.shape
    flat = scores.reshape(-1, rewards).float()
    return RewardReport(
        names=tuple(names), scores=flat, status=torch.zeros_like(flat, dtype=torch.int64),
        weight=torch.tensor(weights).expand_as(flat), group=torch.arange(count).repeat_interleave(group),
        prompts=tuple(Prompt(id=f"p/{p}", text="x", task="t2i", category="c") for p in range(count)),
    )  # fmt: skip


def filtered(made: RewardReport, **options: Any) -> Admission:
    return Range(RangeOptions.model_validate({"quantile": None, "threshold": 0.0} | options)).admit(made)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("count", "q", "mean"), [(4, 3.63, 2.06), (8, 4.29, 2.85), (16, 4.84, 3.53), (24, 5.15, 3.90)])
def test_ranges_of_a_normal_are_those_of_the_tables(count: int, q: float, mean: float) -> None:
    assert noise_range(count, 0.95) == pytest.approx(q, abs=0.01)
    assert expected_range(count) == pytest.approx(mean, abs=0.01)


def test_of_prompts_with_nothing_but_noise_one_in_twenty_gets_through() -> None:
    sigma = 0.04
    admission = filtered(report(sigma * draws(4000, G, 1)), noise={"a": sigma})
    assert float(admission.keep.float().mean()) == pytest.approx(0.05, abs=0.012)  # 3.5 standard errors
    assert "which noise alone reaches" in admission.reason[admission.keep.tolist().index(False)]


def test_the_noise_of_a_composite_is_that_of_its_weighted_parts() -> None:
    made = report(torch.tensor([0.0, 1.0])[None, :, None].expand(1, 2, 2), ("a", "b"), (3.0, 1.0))
    noise = noise_of(made, {"a": 0.2, "b": 0.4})
    assert noise.of_prompt(made, torch.arange(2)) == pytest.approx(((0.75 * 0.2) ** 2 + (0.25 * 0.4) ** 2) ** 0.5)


def test_a_known_noise_is_threshold_enough_and_an_unknown_reward_is_refused() -> None:
    assert RangeOptions(threshold=None, quantile=None, noise={"a": 0.1}).noise == {"a": 0.1}
    with pytest.raises(VelaturaError, match=r"`noise` names 'A', which is no reward here\. There is: a"):
        filtered(report(draws(2, G, 1)), noise={"A": 0.1})
    with pytest.raises(ValidationError, match="the lowest score comes first"):
        RangeOptions(bounds={"a": (1, 0)})


def repeated(quality: Tensor, sigma: float, passes: int = 2) -> RewardReport:
    """`quality` [P G] judged with noise, several times."""
    noisy = [quality[..., None] + sigma * draws(*quality.shape, 1, seed=k + 1) for k in range(passes)]
    made = [report(scores) for scores in noisy]
    every = replace(made[0], scores=torch.cat([m.scores for m in made]), status=torch.cat([m.status for m in made]),
                    weight=torch.cat([m.weight for m in made]), group=torch.cat([m.group for m in made]))  # fmt: skip
    return by_pass(every, torch.arange(passes).repeat_interleave(quality.numel()))


def test_noise_is_measured_where_pictures_are_scored_twice() -> None:
    made = repeated(draws(300, G), 0.3)
    assert made.repeats is not None and made.repeats.shape == (1, 300 * G, 1)
    assert noise_of(made, {}).sigma["a", "c"] == pytest.approx(0.3, rel=0.05)
    assert noise_of(made, {"a": 0.1}).sigma["a", "c"] == 0.1


def test_a_failed_second_score_says_nothing_of_noise() -> None:
    made = repeated(draws(300, G), 0.3)
    assert made.repeats is not None
    made.repeats[0, ::2] = torch.nan
    assert noise_of(made, {}).sigma["a", "c"] == pytest.approx(0.3, rel=0.07)


def test_a_range_that_is_the_judges_own_disagreement_is_noisy() -> None:
    quality = torch.cat([torch.zeros(1, G), 10 * torch.linspace(0, 1, G)[None]]).double()
    made = repeated(quality, 1.0, passes=6)
    admission = filtered(made, noise={"a": 0.01})
    assert admission.state == ("noisy", "active")
    assert "of the variance is the judge's own" in admission.reason[0]


@pytest.mark.parametrize(
    ("scores", "state"),
    [
        ([1, 1, 1, 1, 1, 1, 1, 0.97], "solved"),
        ([1, 1, 1, 1, 1, 1, 1, 1], "solved"),
        ([1, 1, 1, 1, 1, 1, 1, 0.2], "active"),
        ([0.01, 0, 0, 0.04, 0, 0, 0, 0], "too_hard"),
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "flat"),
        ([0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "active"),
    ],
)  # fmt: skip
def test_samples_at_an_end_of_the_scale_are_solved_or_too_hard(scores: list[float], state: str) -> None:
    admission = filtered(report(torch.tensor(scores)[None, :, None]), bounds={"a": [0, 1]})
    assert admission.state == (state,)
    assert admission.keep.tolist() == [state == "active"]


def test_without_bounds_of_every_weighted_reward_nobody_is_solved() -> None:
    made = report(torch.ones(1, G, 2), ("a", "b"), (1.0, 1.0))
    assert filtered(made, bounds={"a": [0, 1]}).state == ("flat",)
    assert filtered(made, bounds={"a": [0, 1], "b": [0, 1]}).state == ("solved",)


def test_a_range_of_one_reward_against_a_held_out_one_is_hackable() -> None:
    up = torch.linspace(0, 1, G)
    flat = 0.1 * torch.tensor([0.0, 1] * (G // 2))
    made = report(torch.stack([up, flat, -up], 1)[None], ("a", "b", "guard"), (1.0, 1.0, 0.0))
    assert filtered(made, held_out=["guard"]).state == ("hackable",)
    assert filtered(made).state == ("active",)
    agreeing = report(torch.stack([up, flat, up], 1)[None], ("a", "b", "guard"), (1.0, 1.0, 0.0))
    assert filtered(agreeing, held_out=["guard"]).state == ("active",)
    shared = report(torch.stack([up, up, -up], 1)[None], ("a", "b", "guard"), (1.0, 1.0, 0.0))
    assert filtered(shared, held_out=["guard"]).state == ("active",)


def test_a_prompt_that_the_rewards_fail_on_is_failed() -> None:
    made = report(draws(1, G, 1))
    made.status[:3] = int(Status.FAILED)
    assert filtered(made).state == ("failed",)


def test_what_lies_near_the_threshold_is_borderline() -> None:
    ranges = torch.arange(1.0, 22.0)
    made = report((ranges[:, None] * torch.linspace(0, 1, G))[..., None])
    admission = filtered(made, threshold=8.0)
    assert admission.borderline is not None
    near = [p for p, close in enumerate(admission.borderline.tolist()) if close]
    assert near == [p for p in range(21) if abs(float(ranges[p]) - 8) < 0.5 * 10]  # the interquartile range is 10


def test_a_borderline_decision_is_taken_on_both_looks() -> None:
    first = filtered(
        report((torch.tensor([1.1, 0.9, 1.1, 1.2])[:, None] * torch.linspace(0, 1, G))[..., None]), threshold=1.0
    )
    fresh = filtered(
        report((torch.tensor([0.5, 1.5, 0.0])[:, None] * torch.linspace(0, 1, G))[..., None]), threshold=9.0,
        bounds={"a": [0, 10]},
    )  # fmt: skip
    fresh = replace(fresh, state=("flat", "flat", "too_hard"))
    admission = confirmation(first, fresh, [0, 1, 2])
    assert admission.keep.tolist() == [False, True, False, True]
    assert admission.state == ("flat", "active", "too_hard", "active")
    assert admission.reason[0] == "mean range 0.8 of two looks (1.1, 0.5) < 1"
    assert admission.reason[1] == "kept: mean range 1.2 of two looks (0.9, 1.5)"
    torch.testing.assert_close(admission.statistic, torch.tensor([0.8, 1.2, 1.1, 1.2]))


def test_confirmation_keeps_fewer_prompts_that_are_not_worth_it() -> None:
    """Regression to the mean: of what one look keeps, more lie below the threshold than of what two looks keep."""
    true = torch.exp(-2.5 + 0.6 * draws(2000, seed=9))
    looks = [
        report((true[:, None] * draws(2000, G, seed=s) + 0.04 * draws(2000, G, seed=s + 50))[..., None]) for s in (1, 2)
    ]
    first, fresh = (Range(RangeOptions(quantile=0.5)).admit(look) for look in looks)
    assert first.borderline is not None
    rows = torch.nonzero(first.borderline).flatten().tolist()
    second = Admission(
        keep=fresh.keep[rows], reason=tuple(fresh.reason[r] for r in rows), statistic=fresh.statistic[rows],
        state=tuple(fresh.state[r] for r in rows),
    )  # fmt: skip
    both = confirmation(first, second, rows)
    poor = true < true.median()
    wrong_once, wrong_twice = (float(poor[a.keep].float().mean()) for a in (first, both))
    assert 0.1 < wrong_twice < 0.85 * wrong_once


def test_the_ledger_says_state_threshold_and_ranges(tmp_path: Path) -> None:
    made = report(torch.stack([torch.linspace(0, d, G) for d in (0.1, 1.0)])[..., None])
    rows = rows_of(made, filtered(made, threshold=0.5), "base")
    write_rows(tmp_path / "ledger.parquet", rows)
    read = pq.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert [(r["state"], r["keep"], r["threshold"], r["n"]) for r in read] == [
        ("flat", False, 0.5, 8),
        ("active", True, 0.5, 8),
    ]
    assert [r["reward/a/range"] for r in read] == pytest.approx([0.1, 1.0])
    assert states_by_category(rows) == {"c": {"active": 1, "flat": 1}}


def test_training_refreshes_the_ledger_and_a_repeated_step_changes_nothing(tmp_path: Path) -> None:
    curated, path = tmp_path / "ledger.parquet", tmp_path / "prompts.parquet"
    made = report(torch.linspace(0, 1, 4)[None, :, None])
    write_rows(curated, rows_of(made, filtered(made), "base"))
    ledger = TrainingLedger.open(path, G, curated)
    start = expected_range(G) / expected_range(4)
    assert ledger.rows["p/0"]["mean_range"] == pytest.approx(start)
    ledger.refresh(0, report(torch.linspace(0, 2, G)[None, :, None]), None)
    now = 0.7 * start + 0.3 * 2
    again = TrainingLedger.open(path, G, curated)
    again.refresh(0, report(torch.linspace(0, 9, G)[None, :, None]), None)
    assert read_rows(path)[0]["mean_range"] == pytest.approx(now)
    again.refresh(1, report(torch.zeros(1, G, 1)), None)
    (row,) = read_rows(path)
    assert row["mean_range"] == pytest.approx(0.7 * now)
    assert (row["state"], row["seen"], row["step"]) == ("flat", 2, 1)


def test_groups_dropped_online_are_counted_by_state() -> None:
    made = report(torch.stack([torch.linspace(0, d, G) for d in (0.1, 1.0, 0.0, 2.0)])[..., None])
    found = admission_metrics(filtered(made, noise={"a": 0.1}))
    assert found == {"filter/dropped": 0.5, "filter/flat": 0.5}
    assert admission_metrics(None) == {}
