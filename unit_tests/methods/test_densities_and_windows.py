"""Timesteps by a density over time, and windows of steps."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from velatura.api import TimestepSampler, VelaturaError
from velatura.core.check import check_combinations
from velatura.core.errors import RecipeError
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry
from velatura.schedulers.densities import Beta, BetaOptions, LogitNormal, LogitNormalOptions
from velatura.schedulers.window import Window, WindowOptions

TINY = Path(__file__).parents[2] / "integration_tests" / "recipes" / "tiny.yaml"
EVEN = torch.linspace(1, 0, 9)
SHIFTED = 3 * EVEN / (1 + 2 * EVEN)
DRAWS = 4000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequency(sampler: TimestepSampler, grid: Tensor) -> Tensor:  # type: ignore[type-arg]
    generator = seeded()
    picks = torch.cat([sampler.plan(grid, generator).train for _ in range(DRAWS)])
    return torch.bincount(picks, minlength=len(grid) - 1).double() / DRAWS


def measured_mass(draws: Tensor, grid: Tensor) -> Tensor:
    """Share of `draws` of times in each step of the grid."""
    return torch.stack([((draws <= a) & (draws > b)).double().mean() for a, b in pairwise(grid)])


@pytest.mark.parametrize("grid", [EVEN, SHIFTED], ids=["even", "shifted"])
@pytest.mark.parametrize(("a", "b"), [(5.0, 2.0), (2.0, 5.0), (0.5, 0.5)])
def test_beta_draws_steps_as_often_as_their_times(a: float, b: float, grid: Tensor) -> None:
    one, other = (torch._standard_gamma(torch.full((200_000,), c), generator=seeded(i)) for i, c in enumerate((a, b)))
    expected = measured_mass(one / (one + other), grid)
    sampler = Beta(BetaOptions(a=a, b=b, count=1, drop_first=False))
    torch.testing.assert_close(frequency(sampler, grid), expected, atol=0.03, rtol=0)  # 4 standard errors


@pytest.mark.parametrize("grid", [EVEN, SHIFTED], ids=["even", "shifted"])
def test_logit_normal_draws_steps_as_often_as_their_times(grid: Tensor) -> None:
    times = (0.5 + 1.5 * torch.randn(200_000, generator=seeded())).sigmoid()
    sampler = LogitNormal(LogitNormalOptions(mean=0.5, std=1.5, count=1, drop_first=False))
    torch.testing.assert_close(frequency(sampler, grid), measured_mass(times, grid), atol=0.03, rtol=0)


def test_beta_over_the_rollout_does_not_look_at_times() -> None:
    sampler = Beta(BetaOptions(over="steps", count=1, drop_first=False))
    plans = [[sampler.plan(grid, seeded(seed)).train.tolist() for seed in range(40)] for grid in (EVEN, SHIFTED)]
    assert plans[0] == plans[1]
    assert frequency(sampler, SHIFTED)[4:].sum() > 0.85  # Beta(5, 2) of what is behind: towards the end


SAMPLERS: list[TimestepSampler] = [  # type: ignore[type-arg]
    Beta(BetaOptions(count=3)),
    Beta(BetaOptions(count=7, a=200.0, b=0.2)),  # masses that underflow
    LogitNormal(LogitNormalOptions(count=3)),
    LogitNormal(LogitNormalOptions(count=7, mean=60.0, std=0.1)),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_steps_are_sorted_distinct_and_the_only_ones_with_noise(sampler: TimestepSampler) -> None:  # type: ignore[type-arg]
    for seed in range(20):
        plan = sampler.plan(EVEN, seeded(seed))
        train = plan.train.tolist()
        assert train == sorted(set(train)) and len(train) == sampler.options.count
        assert 0 not in train
        assert torch.nonzero(plan.stochastic).flatten().tolist() == train
        assert torch.equal(plan.train, sampler.plan(EVEN, seeded(seed)).train)


def window(**options: object) -> Window:
    return Window(WindowOptions.model_validate(options))


def steps_of(sampler: Window, round_: int, seed: int = 0) -> list[int]:
    return sampler.plan_at(round_, EVEN, seeded(seed)).train.tolist()


def test_a_fixed_window_stays() -> None:
    assert [steps_of(window(place="fixed", width=2, start=3), i, seed=i) for i in (0, 99)] == [[3, 4]] * 2


def test_a_sliding_window_goes_from_noise_to_the_picture_and_stays_there() -> None:
    sampler = window(width=3, every=10, stride=2)
    found = [steps_of(sampler, i, seed=i)[0] for i in (0, 9, 10, 19, 20, 30, 1000)]
    assert found == [0, 0, 2, 2, 4, 5, 5]
    assert sampler.plan(EVEN, seeded()).train.tolist() == [0, 1, 2]


def test_a_random_window_is_anywhere_within_its_share_of_the_grid() -> None:
    sampler = window(place="random", width=2, start=1, within=0.75)
    starts = [steps_of(sampler, 0, seed)[0] for seed in range(200)]
    assert set(starts) == {1, 2, 3, 4}
    assert steps_of(sampler, 5, seed=7) == steps_of(sampler, 900, seed=7)


@pytest.mark.parametrize("noise", ["trained", "all"])
def test_noise_is_drawn_in_the_window_or_everywhere(noise: str) -> None:
    plan = window(place="fixed", width=2, start=3, noise=noise).plan(EVEN, seeded())
    drawn = torch.nonzero(plan.stochastic).flatten().tolist()
    assert drawn == ([3, 4] if noise == "trained" else list(range(8)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 9}, "a window of 9 step.* from step 0 does not fit on the grid of 8 steps"),
        ({"width": 2, "start": 7, "place": "fixed"}, "a window of 2 step.* from step 7"),
        ({"width": 5, "place": "random"}, "first 0.5 of the grid, 4 of its 8 steps"),
    ],
)
def test_a_window_outside_the_grid_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(VelaturaError, match=said):
        window(**options).plan(EVEN, seeded())


@pytest.mark.parametrize("stage", ["teacher_t2i", "student"])
def test_a_window_outside_the_grid_is_refused_when_the_recipe_is_read(stage: str) -> None:
    override = f"stages.{stage}.timesteps={{use: window, with: {{width: 4}}}}"
    with pytest.raises(RecipeError, match=f"{stage}.timesteps: a window of 4 step.* does not fit on the grid of 3"):
        check_combinations(load_recipe(TINY, [override]), Registry.discover())


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (BetaOptions, {"a": 0}),
        (LogitNormalOptions, {"std": 0}),
        (WindowOptions, {"width": 0}),
        (WindowOptions, {"within": 0}),
    ],
)
def test_impossible_options_are_refused(options: type, wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        options.model_validate(wrong)
