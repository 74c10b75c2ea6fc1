"""The Euler kernel against exact flows, and the plans of the timestep samplers."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from velatura.api import TimestepSampler, VelaturaError
from velatura.schedulers.kernels import Ode
from velatura.schedulers.timesteps import All, AllOptions, HighNoise, HighNoiseOptions, Uniform, UniformOptions

GRID = torch.linspace(1, 0, 41)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_velocity(x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """E[eps - x_0 | x_t] for x_0 ~ N(mean, std^2)."""
    residual = (x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
    return (t - (1 - t) * std**2) * residual - mean


def flow(x: Tensor, steps: int, mean: float, std: float) -> Tensor:
    grid = torch.linspace(1, 0, steps + 1, dtype=x.dtype)
    for t, t_next in pairwise(grid):
        x = Ode().step(exact_velocity(x, t, mean, std), x, t, t_next).mean
    return x


def test_the_exact_flow_of_a_gaussian_reproduces_its_mean_and_std() -> None:
    x = torch.randn(20_000, generator=seeded(), dtype=torch.float64)
    end = flow(x, 1000, mean=0.49, std=0.29)
    torch.testing.assert_close(end.mean(), torch.tensor(0.49).double(), atol=0.01, rtol=0)  # 4 standard errors
    torch.testing.assert_close(end.std(), torch.tensor(0.29).double(), atol=0.01, rtol=0)


def test_the_flow_map_of_a_gaussian_is_affine_and_the_error_first_order() -> None:
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    coarse, fine = ((flow(z, steps, 0.5, 0.3) - (0.5 + 0.3 * z)).abs().max() for steps in (200, 400))
    assert fine < 0.01
    assert 1.8 < coarse / fine < 2.2  # halving the step halves the error


def test_a_straight_path_is_exact_in_any_number_of_steps() -> None:
    x0, eps = torch.randn(2, 5, 3, generator=seeded(), dtype=torch.float64)
    x = eps
    for t, t_next in [(1.0, 0.7), (0.7, 0.05), (0.05, 0.0)]:
        x = Ode().step(eps - x0, x, torch.tensor(t), torch.tensor(t_next)).mean
    torch.testing.assert_close(x, x0, atol=1e-7, rtol=0)  # times are fp32


def test_the_ode_step_is_deterministic_and_keeps_fp32() -> None:
    x = torch.randn(2, 3, generator=seeded())
    out = Ode().step(torch.ones_like(x, dtype=torch.bfloat16), x, torch.tensor(1.0), torch.tensor(0.75))
    assert out.mean.dtype == torch.float32
    assert torch.equal(out.std, torch.tensor(0.0))
    torch.testing.assert_close(out.mean, x - 0.25)


SAMPLERS: list[TimestepSampler] = [  # type: ignore[type-arg]
    All(),
    Uniform(UniformOptions(count=7)),
    HighNoise(HighNoiseOptions(count=7, power=3)),
    HighNoise(HighNoiseOptions(count=7, power=500)),  # weights that underflow fp64
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_steps_are_sorted_distinct_and_within_the_grid(sampler: TimestepSampler) -> None:  # type: ignore[type-arg]
    for seed in range(20):
        plan = sampler.plan(GRID, seeded(seed))
        assert plan.train.tolist() == sorted(set(plan.train.tolist()))
        assert plan.train.min() >= 0 and plan.train.max() < 40
        assert plan.train.dtype == torch.int64
        assert plan.weight.shape == plan.stochastic.shape == (40,)
        assert torch.nonzero(plan.stochastic).flatten().tolist() == plan.train.tolist()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_the_same_generator_state_gives_the_same_plan(sampler: TimestepSampler) -> None:  # type: ignore[type-arg]
    assert torch.equal(sampler.plan(GRID, seeded(5)).train, sampler.plan(GRID, seeded(5)).train)


def test_successive_draws_differ() -> None:
    generator = seeded()
    plans = [HighNoise().plan(GRID, generator).train.tolist() for _ in range(5)]
    assert len({tuple(plan) for plan in plans}) > 1


def test_all_trains_on_every_step_including_pure_noise() -> None:
    assert All().plan(GRID, seeded()).train.tolist() == list(range(40))
    assert All(AllOptions(drop_first=True)).plan(GRID, seeded()).train.tolist() == list(range(1, 40))


def test_high_noise_draws_in_proportion_to_a_power_of_time() -> None:
    grid, generator = torch.tensor([1.0, 0.8, 0.4, 0.2, 0.0]), seeded()
    sampler = HighNoise(HighNoiseOptions(count=1, power=2, drop_first=False))
    picks = torch.cat([sampler.plan(grid, generator).train for _ in range(8000)])
    expected = grid[:-1] ** 2 / (grid[:-1] ** 2).sum()
    frequency = torch.bincount(picks, minlength=4) / 8000
    torch.testing.assert_close(frequency, expected, atol=0.02, rtol=0)  # 3.5 standard errors


def test_uniform_draws_all_steps_alike() -> None:
    generator = seeded()
    picks = torch.cat(
        [Uniform(UniformOptions(count=2)).plan(torch.linspace(1, 0, 6), generator).train for _ in range(4000)]
    )
    frequency = torch.bincount(picks, minlength=5) / 4000
    torch.testing.assert_close(frequency, torch.tensor([0, 0.5, 0.5, 0.5, 0.5]), atol=0.03, rtol=0)  # 4 standard errors


def test_pure_noise_is_left_out_unless_asked_for() -> None:
    options = {"count": 40, "power": 4.0}
    assert 0 not in HighNoise(HighNoiseOptions(**options)).plan(GRID, seeded()).train
    assert 0 in HighNoise(HighNoiseOptions(**options, drop_first=False)).plan(GRID, seeded()).train


def test_a_floor_keeps_low_noise_steps_out() -> None:
    plan = HighNoise(HighNoiseOptions(count=40, floor=0.5)).plan(GRID, seeded())
    assert GRID[plan.train].min() >= 0.5
    assert len(plan.train) == 20  # t = 0.975 down to 0.5; fewer than asked for


def test_a_grid_without_a_step_to_train_on_is_refused() -> None:
    with pytest.raises(VelaturaError, match=r"No step is left to train on.*drop_first"):
        HighNoise().plan(torch.tensor([1.0, 0.0]), seeded())


@pytest.mark.parametrize("wrong", [{"count": 0}, {"power": -1}, {"floor": 1.0}, {"powr": 2}])
def test_impossible_timestep_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        HighNoiseOptions.model_validate(wrong)
