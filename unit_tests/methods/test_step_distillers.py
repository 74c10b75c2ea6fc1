"""Distillation by steps that drew noise: the divergence, its policy gradient, and what they are on the ODE."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from velatura.api import Distiller, Points, Prompt, Role
from velatura.plugins.distillers.step_match import OPDKL, OPDPG, OPDKLOptions, OPDPGOptions
from velatura.plugins.distillers.velocity_match import VelocityMatch, VelocityMatchOptions
from velatura.plugins.objectives.flow_grpo import FlowGRPO
from velatura.plugins.objectives.grpo_guard import GRPOGuard
from velatura.plugins.objectives.ratio import transition
from velatura.plugins.objectives.velocity_kl import weighted_error
from velatura.schedulers.stochastic import Cps, DanceSde, FlowSde

KERNELS = pytest.mark.parametrize("kernel", [FlowSde(), DanceSde(), Cps()], ids=lambda kernel: kernel.name)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(kernel: FlowSde | DanceSde | Cps, v: Tensor, noise: Tensor) -> Points:
    """Steps that velocities [N D] drew with `noise` [N D]."""
    count = len(v)
    t = torch.linspace(1, 0.2, count).double()
    bare = Points(
        x=random(count, v.shape[1], seed=1), t=t, t_next=t - 0.15, advantage=torch.zeros(count).double(),
        weight=torch.full((count,), 1 / count, dtype=torch.float64), x_next=torch.zeros_like(v), kernel=kernel,
    )  # fmt: skip
    drawn = transition(bare, v)
    return replace(bare, x_next=drawn.mean + drawn.std * noise)


def velocities(count: int, dims: int, distance: float) -> dict[Role, Tensor]:
    student = random(count, dims, seed=3)
    return {
        Role.CURRENT: student.clone().requires_grad_(), Role.OLD: student,
        Role.TEACHER: student + distance * random(count, dims, seed=4),
    }  # fmt: skip


def gradient(distiller: Distiller, where: Points, velocity: dict[Role, Tensor]) -> Tensor:  # type: ignore[type-arg]
    (result,) = torch.autograd.grad(distiller.loss(where, velocity).value, velocity[Role.CURRENT])
    return result


@KERNELS
def test_the_divergence_is_velocity_matching_under_the_weight_of_its_step(kernel: FlowSde | DanceSde | Cps) -> None:
    velocity = velocities(4, 6, 0.5)
    where = steps(kernel, velocity[Role.OLD], random(4, 6, seed=2))
    one, zero = (transition(where, torch.full((4, 6), value).double()) for value in (1.0, 0.0))
    weight = ((one.mean - zero.mean)[:, 0] / one.std[:, 0]).square() / 2
    weighted = replace(where, weight=where.weight * weight)
    matched = VelocityMatch().loss(weighted, velocity).value
    torch.testing.assert_close(OPDKL().loss(where, velocity).value, matched, atol=1e-14, rtol=1e-11)
    torch.testing.assert_close(
        gradient(OPDKL(), where, velocity), gradient(VelocityMatch(), weighted, velocity), atol=1e-14, rtol=1e-10
    )
    assert where.t_next is not None
    code = OPDKL(OPDKLOptions(kl_convention="flow_grpo_code")).loss(where, velocity).value
    torch.testing.assert_close(code, 0.15 * OPDKL().loss(where, velocity).value, atol=1e-14, rtol=1e-10)


@KERNELS
def test_the_policy_gradient_is_that_of_the_divergence_in_expectation(kernel: FlowSde | DanceSde | Cps) -> None:
    """Over the noise of one latent dimension by quadrature, which is exact for these polynomials."""
    nodes, share = np.polynomial.hermite_e.hermegauss(12)
    velocity = velocities(3, 1, 0.05)
    total = torch.zeros(3, 1).double()
    for node, part in zip(nodes, share / share.sum(), strict=True):
        where = steps(kernel, velocity[Role.OLD], torch.full((3, 1), node, dtype=torch.float64))
        total += part * gradient(OPDPG(OPDPGOptions(clip_range=0.9, max_advantage=1e6)), where, velocity)
    torch.testing.assert_close(total, gradient(OPDKL(), where, velocity), atol=1e-14, rtol=1e-9)


def test_of_several_dimensions_the_policy_gradient_is_smaller_by_their_number() -> None:
    """Antithetic noise takes out what is odd in it; what is left is the mean over random signs."""
    velocity = velocities(2, 3, 0.05)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6).reshape(-1, 2, 3)
    options = OPDPG(OPDPGOptions(clip_range=0.9, max_advantage=1e6))
    grads = [gradient(options, steps(FlowSde(), velocity[Role.OLD], noise), velocity) for noise in signs]
    mean = torch.stack(grads).mean(0)  # signs have the mean and variance of the noise
    closed = gradient(OPDKL(), steps(FlowSde(), velocity[Role.OLD], signs[0]), velocity) / 3
    torch.testing.assert_close(mean, closed, atol=1e-14, rtol=1e-9)


@KERNELS
@pytest.mark.parametrize("distiller", [OPDKL(), OPDPG(OPDPGOptions(clip_range=0.5))], ids=lambda d: d.name)
def test_gradients_are_those_of_finite_differences(distiller: Distiller, kernel: FlowSde | DanceSde | Cps) -> None:  # type: ignore[type-arg]
    velocity = velocities(3, 4, 0.4)
    where = steps(kernel, velocity[Role.OLD], random(3, 4, seed=2))
    v = (velocity[Role.CURRENT].detach() + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: distiller.loss(where, velocity | {Role.CURRENT: u}).value, v)


@pytest.mark.parametrize("distiller", [OPDKL(), OPDPG(), VelocityMatch()], ids=lambda d: d.name)
def test_a_student_like_its_teacher_learns_nothing_at_any_time(distiller: Distiller) -> None:  # type: ignore[type-arg]
    velocity = velocities(4, 6, 0.0)
    where = steps(FlowSde(), velocity[Role.OLD], random(4, 6, seed=2))
    assert distiller.loss(where, velocity).value == 0
    assert torch.equal(gradient(distiller, where, velocity), torch.zeros(4, 6).double())
    prompt = Prompt(id="a", text="a", task="edit", category="hair")
    by_category = type(distiller)(type(distiller.options).model_validate({"route": "category"}))
    assert (distiller.teacher(prompt), by_category.teacher(prompt)) == ("edit", "hair")


@pytest.mark.parametrize("weight", ["t", "ghuber", "adaptive-l1"])
def test_velocity_matching_may_weigh_a_state_by_its_own_error(weight: str) -> None:
    velocity = velocities(4, 6, 0.5)
    where = steps(FlowSde(), velocity[Role.OLD], random(4, 6, seed=2))
    value = VelocityMatch(VelocityMatchOptions.model_validate({"weight": weight})).loss(where, velocity).value
    error = (velocity[Role.CURRENT] - velocity[Role.TEACHER]).detach()
    torch.testing.assert_close(value.detach(), weighted_error(error, where.t, weight).mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [FlowGRPO(), GRPOGuard()], ids=lambda o: o.name)
def test_states_that_were_kept_in_bf16_have_a_first_ratio_of_exactly_1(objective: FlowGRPO | GRPOGuard) -> None:
    """Rounded first, looked at afterwards: the gap is then 0; a likelihood from before the rounding shows as a gap."""
    velocity = velocities(4, 64, 0.0)
    exact = steps(FlowSde(), velocity[Role.OLD], random(4, 64, seed=2))
    assert exact.x_next is not None
    kept = replace(exact, x=exact.x.bfloat16(), x_next=exact.x_next.bfloat16(), advantage=torch.ones(4).double())
    drawn = transition(kept, velocity[Role.OLD])
    after, before = (FlowSde().log_prob(x, drawn) for x in (kept.x_next, exact.x_next))
    rounded = objective.loss(replace(kept, log_prob=after), velocity).metrics
    assert rounded["ratio"] == 1 and rounded["rollout_gap"] == 0
    assert objective.loss(replace(kept, log_prob=before), velocity).metrics["rollout_gap"] > 1e-4
    assert gradient(objective, kept, velocity).isfinite().all()  # type: ignore[arg-type]
