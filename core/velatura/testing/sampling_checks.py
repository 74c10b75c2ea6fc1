"""Checks of guidance policies, kernels and timestep samplers."""

from __future__ import annotations

import torch
from torch import Tensor

from velatura.core.types import Role, StepPlan
from velatura.testing.kit import NotChecked, Subject, check, require, require_close, require_finite, untouched

TIMES = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.05])
STEP = 1e-3
"""A step that is small enough for its first order to be nearly all of it."""


@check("guidance")
def one_finite_scale_per_time(subject: Subject) -> None:
    """[N] for every role."""
    policy = subject.ready()
    for role in Role:
        scale = policy.scale(role, TIMES)
        require(scale.shape == TIMES.shape, f"scale of {role} has shape {list(scale.shape)} for times [{len(TIMES)}]")
        require_finite(scale, f"the scale of {role}")


@check("guidance")
def scale_does_not_depend_on_the_batch(subject: Subject) -> None:
    """A time has its scale, whatever other times stand beside it; the times stay as they are."""
    policy = subject.ready()
    for role in Role:
        with untouched("`scale`", TIMES):
            together = policy.scale(role, TIMES)
        alone = torch.cat([policy.scale(role, time[None]) for time in TIMES])
        require_close(alone, together, f"the scale of {role} changes with the times beside it", 1e-6)


@check("guidance")
def policies_that_are_compared_are_guided_alike(subject: Subject) -> None:
    """CURRENT, OLD and REFERENCE: else the ratio of equal policies is not 1, and their distance not 0."""
    policy = subject.ready()
    current = policy.scale(Role.CURRENT, TIMES)
    for role in (Role.OLD, Role.REFERENCE):
        require_close(policy.scale(role, TIMES), current, f"{role} is not guided like {Role.CURRENT}", 0.0)


def _flow(t: Tensor, *, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """For data N(1, spread^2): states [4096] that stand for x_t, their exact velocity, and the variance of x_t.

    x_t ~ N(1 - t, s), s = (1 - t)^2 spread^2 + t^2; v = E[eps - x_0 | x_t] is linear in x_t.
    """
    share = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    variance = (1 - t).square() * spread**2 + t.square()
    x = (1 - t) + variance.sqrt() * torch.special.ndtri(share)
    return x.float(), _exact(x, t, spread=spread).float(), variance


def _exact(x: Tensor, t: Tensor, *, spread: float = 0.5) -> Tensor:
    """E[eps - x_0 | x_t] [N] of data N(1, spread^2)."""
    variance = (1 - t).square() * spread**2 + t.square()
    return (t - (1 - t) * spread**2) / variance * (x - (1 - t)) - 1


@check("kernel")
def a_deterministic_kernel_follows_the_velocity(subject: Subject) -> None:
    """Without noise a small step moves by (t_next - t) v, and std is 0."""
    kernel = subject.ready()
    for time in (0.9, 0.5, 0.1):
        t = torch.tensor(time, dtype=torch.float64)
        x, v, _ = _flow(t)
        step = kernel.step(v, x, t.float(), (t - STEP).float())
        std = torch.as_tensor(step.std)
        if kernel.stochastic:
            require(
                bool((std > 0).all()), f"it says that it is stochastic, but std at t = {time} is {float(std.min())}"
            )
            continue
        require(bool((std == 0).all()), f"it does not say `stochastic = True`, but std at t = {time} is not 0")
        require_close((step.mean - x) / -STEP, v, f"a small step at t = {time} does not follow v", 0.02)


@check("kernel")
def marginals_are_kept(subject: Subject) -> None:
    """A small step takes x_t to x_{t_next} in distribution: for Gaussian data mean and variance are known exactly."""
    kernel = subject.ready()
    if not kernel.keeps_marginals:
        raise NotChecked("it says that it does not keep them")
    for time in (0.9, 0.5, 0.1):
        t = torch.tensor(time, dtype=torch.float64)
        x, v, before = _flow(t)
        _, _, after = _flow(t - STEP)
        given = _flow(t)[0].double().var(correction=0) / before
        step = kernel.step(v, x, t.float(), (t - STEP).float())
        mean = step.mean.double()
        variance = mean.var(correction=0) / given + torch.as_tensor(step.std).double().square().mean()
        drift, spread = float(mean.mean() - x.double().mean()) / STEP, float(variance - before) / STEP
        wanted = float(after - before) / STEP
        require(abs(drift - 1) < 0.05, f"at t = {time} the mean moves by {drift:.3f} per time instead of 1")
        require(
            abs(spread - wanted) < 0.05 * max(1.0, abs(wanted)),
            f"at t = {time} the variance changes by {spread:.3f} per time instead of {wanted:.3f}: the drift does not "
            f"make up for the noise",
        )


@check("kernel")
def a_second_velocity_brings_a_step_nearer(subject: Subject) -> None:
    """Of a kernel that asks twice: on the exact flow of Gaussian data, whose solution is known, `corrected` ends nearer
    to it than Euler's step, and the last step, to t = 0, is finite."""
    kernel = subject.ready()
    if kernel.evaluations == 1:
        return
    for time, gap in ((0.9, 0.2), (0.6, 0.2), (0.4, 0.1)):
        t, t_next = torch.tensor(time, dtype=torch.float64), torch.tensor(time - gap, dtype=torch.float64)
        x, v, before = _flow(t)
        exact = (1 - t_next) + (x.double() - (1 - t)) * (_flow(t_next)[2] / before).sqrt()
        midway = kernel.midway(v, x, t.float(), t_next.float())
        require(midway is not None, f"`evaluations` is {kernel.evaluations}, but `midway` is None at t = {time}")
        second = _exact(midway.x.double(), torch.as_tensor(midway.t).double()).float()
        reached = kernel.corrected(v, second, x, t.float(), t_next.float())
        errors = [float((y.double() - exact).abs().max()) for y in (reached, kernel.step(v, x, t, t_next).mean)]
        require(errors[0] < errors[1] / 2, f"from t = {time} it ends {errors[0]:.2e} off, Euler's step {errors[1]:.2e}")
    x, v, _ = _flow(torch.tensor(0.1, dtype=torch.float64))
    ends = torch.tensor(0.1), torch.tensor(0.0)
    midway = kernel.midway(v, x, *ends)
    last = kernel.step(v, x, *ends).mean if midway is None else kernel.corrected(v, v, x, *ends)
    require_finite(last, "the last step")


@check("kernel")
def a_step_is_pure(subject: Subject) -> None:
    """The same answer twice, in fp32 and in shape, and nothing is changed in place."""
    kernel = subject.ready()
    draw = torch.Generator().manual_seed(2)
    x, v = torch.randn(3, 4, 5, generator=draw), torch.randn(3, 4, 5, generator=draw)
    t, t_next = torch.tensor(0.6), torch.tensor(0.5)
    with untouched("`step`", x, v, t, t_next):
        first, second = kernel.step(v, x, t, t_next), kernel.step(v, x, t, t_next)
    require(first.mean.dtype == torch.float32, f"the mean of fp32 states is {first.mean.dtype}")
    require(first.mean.shape == x.shape, f"the mean of x {list(x.shape)} has shape {list(first.mean.shape)}")
    broadcast = torch.broadcast_shapes(torch.as_tensor(first.std).shape, x.shape)  # type: ignore[no-untyped-call]
    require(broadcast == x.shape, f"std {list(first.std.shape)} does not broadcast against {list(x.shape)}")
    require_close(second.mean, first.mean, "the mean is another one the second time", 0.0)


def _plans(subject: Subject) -> list[tuple[int, StepPlan]]:
    """A plan for grids of several lengths."""
    sampler = subject.ready()
    return [
        (steps, sampler.plan(torch.linspace(1, 0, steps + 1), torch.Generator().manual_seed(steps)))
        for steps in (4, 10, 40)
    ]


@check("timesteps")
def trained_steps_are_sorted_distinct_and_there(subject: Subject) -> None:
    """[M] int64 of 0..K-1, at least one."""
    for steps, plan in _plans(subject):
        train = plan.train
        require(train.dtype == torch.int64 and train.ndim == 1, f"`train` is {train.dtype} {list(train.shape)}")
        require(len(train) > 0, f"no step of {steps} is trained on")
        require(bool((train.diff() > 0).all()), f"`train` is not sorted and distinct: {train.tolist()}")
        inside = bool(train.min() >= 0) and bool(train.max() < steps)
        require(inside, f"`train` names steps that a grid of {steps} does not have: {train.tolist()}")


@check("timesteps")
def noise_and_weights_are_one_per_step(subject: Subject) -> None:
    """`stochastic` [K] bool; `weight` [K], finite and not negative, more than 0 where it is trained."""
    for steps, plan in _plans(subject):
        require(plan.stochastic.dtype == torch.bool, f"`stochastic` is {plan.stochastic.dtype} instead of bool")
        shapes = [list(plan.stochastic.shape), list(plan.weight.shape)]
        require(shapes == [[steps], [steps]], f"`stochastic` and `weight` have shapes {shapes} for {steps} steps")
        require_finite(plan.weight, "`weight`")
        require(bool((plan.weight >= 0).all()), "`weight` has negative values")
        require(bool((plan.weight[plan.train] > 0).all()), "a step that is trained on has weight 0")


@check("timesteps")
def the_generator_decides(subject: Subject) -> None:
    """The same state gives the same plan on every rank, whatever torch's own random numbers are."""
    grid = torch.linspace(1, 0, 21)
    plans = []
    with torch.random.fork_rng(devices=[]):
        for other in (1, 2, 3):
            torch.manual_seed(other)
            plans.append(subject.ready().plan(grid, torch.Generator().manual_seed(4)))
    for plan in plans[1:]:
        require(
            torch.equal(plan.train, plans[0].train) and torch.equal(plan.stochastic, plans[0].stochastic),
            "two plans from one generator state differ; draw with the generator that is given",
        )
