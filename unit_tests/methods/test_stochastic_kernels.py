"""Steps that draw noise against their published forms, the ODE, and exact marginals of a Gaussian."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from velatura.api import Kernel, Transition
from velatura.schedulers.kernels import Ode
from velatura.schedulers.stochastic import Cps, CpsOptions, DanceSde, DanceSdeOptions, FlowSde, FlowSdeOptions

KERNELS = [FlowSde(), DanceSde(), Cps()]
STEPS = [(1.0, 0.9), (0.9, 0.6), (0.3, 0.1), (0.1, 0.02)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(t: float, t_next: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(t, dtype=torch.float64), torch.tensor(t_next, dtype=torch.float64)


def step(kernel: Kernel, v: Tensor, x: Tensor, t: float, t_next: float) -> Transition:  # type: ignore[type-arg]
    return kernel.step(v, x, *times(t, t_next))


def exact_velocity(x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """E[eps - x_0 | x_t] for x_0 ~ N(mean, std^2)."""
    residual = (x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
    return (t - (1 - t) * std**2) * residual - mean


@pytest.mark.parametrize(("t", "t_next"), STEPS)
def test_the_flow_sde_step_is_its_published_form(t: float, t_next: float) -> None:
    x, v, a = random(4, 5), random(4, 5, seed=1), 0.7
    sigma, dt = a * math.sqrt(t / (1 - (t if t < 1 else t_next))), t_next - t
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    made = step(FlowSde(), v, x, t, t_next)
    torch.testing.assert_close(made.mean, mean, atol=1e-14, rtol=1e-13)
    assert float(made.std) == pytest.approx(sigma * math.sqrt(-dt), rel=1e-14)


@pytest.mark.parametrize(("t", "t_next"), STEPS)
def test_the_dance_step_is_its_published_form(t: float, t_next: float) -> None:
    x, v, eta = random(4, 5), random(4, 5, seed=1), 0.3
    clean, dt = x - t * v, t_next - t
    mean = x + v * dt + 0.5 * eta**2 * (x - (1 - t) * clean) / t**2 * dt
    made = step(DanceSde(), v, x, t, t_next)
    torch.testing.assert_close(made.mean, mean, atol=1e-14, rtol=1e-13)
    assert float(made.std) == pytest.approx(eta * math.sqrt(-dt), rel=1e-14)


@pytest.mark.parametrize(("t", "t_next"), STEPS[1:])
def test_dance_is_flow_sde_at_another_noise_level(t: float, t_next: float) -> None:
    x, v = random(4, 5), random(4, 5, seed=1)
    same = FlowSde(FlowSdeOptions(a=0.3 * math.sqrt((1 - t) / t)))
    one, other = step(DanceSde(), v, x, t, t_next), step(same, v, x, t, t_next)
    torch.testing.assert_close(one.mean, other.mean, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(one.std, other.std, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize(
    "kernel", [FlowSde(FlowSdeOptions(a=1e-9)), DanceSde(DanceSdeOptions(eta=1e-9)), Cps(CpsOptions(eta=1e-9))]
)
@pytest.mark.parametrize(("t", "t_next"), STEPS)
def test_without_noise_every_step_is_eulers(kernel: Kernel, t: float, t_next: float) -> None:  # type: ignore[type-arg]
    x, v = random(4, 5), random(4, 5, seed=1)
    torch.testing.assert_close(
        step(kernel, v, x, t, t_next).mean, step(Ode(), v, x, t, t_next).mean, atol=1e-12, rtol=0
    )


def test_cps_keeps_the_signal_and_the_size_of_the_noise() -> None:
    x0, eps, t, s = random(3, 4), random(3, 4, seed=1), 0.8, 0.6
    kernel = Cps(CpsOptions(eta=0.5))
    made = step(kernel, eps - x0, (1 - t) * x0 + t * eps, t, s)
    kept = (made.mean - (1 - s) * x0) / eps
    torch.testing.assert_close(kept**2 + made.std**2, torch.full_like(kept, s**2), atol=1e-12, rtol=0)
    assert float(made.std) == pytest.approx(s * math.sin(math.pi / 4))


@pytest.mark.parametrize("kernel", [FlowSde(), DanceSde(DanceSdeOptions(eta=0.7))], ids=lambda kernel: kernel.name)
def test_exact_velocities_keep_the_marginals_of_a_gaussian(kernel: Kernel) -> None:  # type: ignore[type-arg]
    """Mean and variance are followed exactly: mu is affine in x, so both have a recursion and nothing is drawn."""
    mean, var, grid = 0.0, 1.0, torch.linspace(1, 0, 2001, dtype=torch.float64)[:-1]
    for t, t_next in pairwise(grid):
        at = torch.tensor([[0.0], [1.0]]).double()
        made = kernel.step(exact_velocity(at, t, 0.49, 0.29), at, t, t_next)
        shift, slope = float(made.mean[0]), float(made.mean[1] - made.mean[0])
        mean, var = shift + slope * mean, slope**2 * var + float(made.std) ** 2
    assert mean == pytest.approx(0.49, abs=2e-3)
    assert math.sqrt(var) == pytest.approx(0.29, abs=2e-3)


@pytest.mark.parametrize(("t", "t_next"), STEPS)
def test_the_kl_of_two_policies_has_its_closed_form(t: float, t_next: float) -> None:
    x, v, other, a = random(4, 5), random(4, 5, seed=1), random(4, 5, seed=2), 0.7
    one, two = (step(FlowSde(), u, x, t, t_next) for u in (v, other))
    measured = (one.mean - two.mean).square() / (2 * one.std**2)
    sigma = a * math.sqrt(t / (1 - (t if t < 1 else t_next)))
    closed = (t - t_next) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2 * (v - other).square()
    torch.testing.assert_close(measured, closed, atol=1e-14, rtol=1e-12)
    if t < 1:
        short = (t - t_next) / 2 * (a**2 + 2) ** 2 / (4 * a**2) * (1 - t) / t * (v - other).square()
        torch.testing.assert_close(measured, short, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_log_probabilities_are_means_over_latent_dimensions(kernel: Kernel) -> None:  # type: ignore[type-arg]
    made = step(kernel, random(4, 2, 3), random(4, 2, 3, seed=1), 0.7, 0.5)
    x = random(4, 2, 3, seed=2)
    stock = torch.distributions.Normal(made.mean, made.std.expand_as(made.mean)).log_prob(x)
    torch.testing.assert_close(kernel.log_prob(x, made), stock.mean((1, 2)), atol=1e-13, rtol=1e-13)


def test_the_released_likelihood_of_cps_drops_every_constant() -> None:
    kernel = Cps(CpsOptions(likelihood="released"))
    made, x = step(kernel, random(4, 5), random(4, 5, seed=1), 0.7, 0.5), random(4, 5, seed=2)
    torch.testing.assert_close(kernel.log_prob(x, made), -(x - made.mean).square().mean(1))
    ratio = kernel.log_prob(x, made) / (2 * made.std**2)
    constant = -made.std.log() - math.log(2 * math.pi) / 2
    torch.testing.assert_close(ratio + constant, Cps().log_prob(x, made), atol=1e-13, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.95), (0.05, 0.0), (1.0, 0.0), (1e-6, 0.0), (0.0, 0.0)])
def test_steps_are_finite_at_both_ends_of_time(kernel: Kernel, t: float, t_next: float) -> None:  # type: ignore[type-arg]
    x = random(4, 5).float()
    made = kernel.step(x, x, torch.tensor(t), torch.tensor(t_next))
    assert made.mean.isfinite().all()
    assert made.std.isfinite()
    assert made.mean.dtype == torch.float32


def test_the_last_step_of_cps_draws_nothing_and_has_no_likelihood() -> None:
    made = step(Cps(), random(4, 5), random(4, 5, seed=1), 0.1, 0.0)
    assert float(made.std) == 0
    assert Cps().log_prob(made.mean, made).isnan().all()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_time_per_row_gives_what_each_time_gives_alone(kernel: Kernel) -> None:  # type: ignore[type-arg]
    x, v = random(4, 2, 3).float(), random(4, 2, 3, seed=1).bfloat16()
    t, t_next = (torch.tensor(column).reshape(4, 1, 1) for column in zip(*STEPS, strict=True))
    made = kernel.step(v, x, t, t_next)
    for i in range(4):
        alone = kernel.step(v[i], x[i], t[i, 0, 0], t_next[i, 0, 0])
        assert torch.equal(made.mean[i], alone.mean)
        assert torch.equal(made.std[i, 0, 0], alone.std)


@pytest.mark.parametrize(
    ("options", "wrong"), [(FlowSdeOptions, {"a": 0}), (DanceSdeOptions, {"eta": -1}), (CpsOptions, {"eta": 1})]
)
def test_impossible_noise_levels_are_refused(options: type, wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        options.model_validate(wrong)
