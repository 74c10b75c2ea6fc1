"""Second-order solvers on a flow whose solution is known; one step from each part of the grid."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from velatura.api import Kernel, VelaturaError
from velatura.schedulers.kernels import Dpm2, Heun, Ode
from velatura.schedulers.timesteps import Stratified, StratifiedOptions

MEAN, STD = 0.4, 0.3


def variance(t: Tensor) -> Tensor:
    return (1 - t) ** 2 * STD**2 + t**2


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[eps - x_0 | x_t] for x_0 ~ N(MEAN, STD^2)."""
    return (t - (1 - t) * STD**2) / variance(t) * (x - (1 - t) * MEAN) - MEAN


def end(kernel: Kernel, count: int, *, last: float = 0.0) -> Tensor:  # type: ignore[type-arg]
    x = torch.tensor([-1.5, 0.2, 2.0]).double()
    for t, t_next in pairwise(torch.linspace(1, last, count + 1).double()):
        v = velocity(x, t)
        midway = kernel.midway(v, x, t, t_next)
        second = None if midway is None else velocity(midway.x, midway.t)
        x = kernel.step(v, x, t, t_next).mean if second is None else kernel.corrected(v, second, x, t, t_next)
    return x


def exact(last: float) -> Tensor:
    t = torch.tensor(last).double()
    return (1 - t) * MEAN + variance(t).sqrt() * torch.tensor([-1.5, 0.2, 2.0]).double()


@pytest.mark.parametrize(("kernel", "order"), [(Ode(), 1), (Heun(), 2), (Dpm2(), 2)], ids=["ode", "heun", "dpm2"])
def test_half_the_step_divides_the_error_by_two_to_the_order(kernel: Kernel, order: int) -> None:  # type: ignore[type-arg]
    """To t = 0.1: the last step of the second-order solvers, to t = 0, is Euler's."""
    coarse, fine = ((end(kernel, count, last=0.1) - exact(0.1)).abs().max() for count in (40, 80))
    assert float(torch.log2(coarse / fine)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("kernel", [Heun(), Dpm2()], ids=["heun", "dpm2"])
def test_at_equal_evaluations_a_second_order_rollout_ends_nearer(kernel: Kernel) -> None:  # type: ignore[type-arg]
    euler, second = ((end(k, count) - exact(0.0)).abs().max() for k, count in ((Ode(), 40), (kernel, 20)))
    assert second < euler


@pytest.mark.parametrize("kernel", [Heun(), Dpm2()], ids=["heun", "dpm2"])
def test_the_last_step_asks_once_and_the_first_has_no_pole(kernel: Kernel) -> None:  # type: ignore[type-arg]
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    one, zero, some = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.1)
    assert kernel.midway(x, x, some, zero) is None
    midway = kernel.midway(x, x, one, some)
    assert midway is not None and midway.x.isfinite().all() and float(midway.t) < 1
    constant = torch.full_like(x, 0.7)
    torch.testing.assert_close(kernel.corrected(constant, constant, x, one, some), x - 0.9 * constant)


def picks(count: int, steps: int, seed: int = 0, **options: object) -> list[int]:
    sampler = Stratified(StratifiedOptions.model_validate({"count": count, **options}))
    found: list[int] = sampler.plan(torch.linspace(1, 0, steps + 1), torch.Generator().manual_seed(seed)).train.tolist()
    return found


def test_each_part_of_the_grid_gives_one_step_and_each_step_its_turn() -> None:
    plans = [picks(3, 13, seed) for seed in range(300)]  # steps 1..12 in three parts of four
    assert all([(k - 1) // 4 for k in plan] == [0, 1, 2] for plan in plans)
    counts = torch.bincount(torch.tensor(plans).flatten(), minlength=13)[1:].double() / 300
    torch.testing.assert_close(counts, torch.full((12,), 0.25).double(), atol=0.11, rtol=0)  # 4 standard errors


def test_parts_of_unequal_length_cover_everything_once() -> None:
    seen = {k for seed in range(200) for k in picks(4, 10, seed, drop_first=False)}
    assert seen == set(range(10))
    assert picks(20, 6) == [1, 2, 3, 4, 5]


def test_the_end_of_the_grid_may_be_left_out() -> None:
    """AWM's: 6 of 14 steps, without the first and the last tenth."""
    assert {k for seed in range(200) for k in picks(6, 14, seed, within=0.9)} == set(range(1, 12))


def test_a_share_that_leaves_no_step_is_refused() -> None:
    assert Stratified(StratifiedOptions(within=0.5)).complaint(4) == ""
    with pytest.raises(VelaturaError, match=r"within 0.2 of 8 step.* leaves none to train on beside the first"):
        picks(2, 8, within=0.2)
