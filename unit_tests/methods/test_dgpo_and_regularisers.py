"""Group preferences and regularisers against closed forms, finite differences and limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from velatura.api import Points, PolicyObjective, Role, VelaturaError
from velatura.plugins.objectives.dgpo import DGPO, DGPOOptions
from velatura.plugins.objectives.flow_grpo import FlowGRPO, FlowGRPOOptions
from velatura.plugins.objectives.ratio import transition
from velatura.plugins.objectives.regularisers import (
    Anchor,
    EmaKL,
    EmaKLOptions,
    KernelKL,
    KernelKLOptions,
    NormHinge,
    NormHingeOptions,
    VelocityKL,
)
from velatura.plugins.objectives.velocity_kl import weighted_error
from velatura.schedulers.stochastic import Cps, DanceSde, FlowSde

P, G, M, D = 2, 3, 2, 5
N = P * G * M
A = [-9.0, 1.0, 2.0, 0.5, -1.0, 0.5]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points() -> Points:
    """P groups of G samples at M times each, sample-major; noise shared within a group."""
    group = torch.arange(P).repeat_interleave(G * M)
    t = torch.tensor([0.9, 0.4]).double().repeat(P * G)
    x0 = random(P * G, D, seed=1).repeat_interleave(M, 0)
    eps = random(P, M, D, seed=2)[:, None].expand(P, G, M, D).reshape(N, D)
    return Points(
        x=(1 - t[:, None]) * x0 + t[:, None] * eps, t=t, x0=x0, target=eps - x0, group=group,
        advantage=torch.tensor(A).double().repeat_interleave(M), weight=torch.full((N,), 1 / N, dtype=torch.float64),
    )  # fmt: skip


def velocities(distance: float = 0.3) -> dict[Role, Tensor]:
    base = random(N, D, seed=3)
    others = {role: base + distance * random(N, D, seed=10 + i) for i, role in enumerate(Role)}
    return others | {Role.CURRENT: base.requires_grad_()}


def gradient(objective: PolicyObjective, where: Points, velocity: dict[Role, Tensor]) -> Tensor:  # type: ignore[type-arg]
    (result,) = torch.autograd.grad(objective.loss(where, velocity).value, velocity[Role.CURRENT])
    return result


def preference(where: Points, velocity: dict[Role, Tensor], beta: float) -> Tensor:
    """-log sigmoid(-beta / G sum_i A_i (d_i - d_ref_i)) summed over prompts and times, without any shortcut."""
    assert where.target is not None and where.group is not None
    d, ref = ((velocity[role] - where.target).square().mean(1) for role in (Role.CURRENT, Role.REFERENCE))
    gained = where.advantage.clamp(-5, 5) * (d - ref)
    terms = [
        -torch.nn.functional.logsigmoid(-beta * gained[(where.group == p) & (where.t == t)].mean())
        for p in range(P)
        for t in where.t.unique()
    ]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("beta", [0.5, 20.0])
def test_the_gradient_of_dgpo_is_that_of_the_preference_of_the_whole_group(beta: float) -> None:
    where, velocity = points(), velocities()
    (whole,) = torch.autograd.grad(preference(where, velocity, beta), velocity[Role.CURRENT])
    got = gradient(DGPO(DGPOOptions(beta=beta, kl=0)), where, velocity)
    torch.testing.assert_close(got, whole * G / (beta * N), atol=1e-13, rtol=1e-9)


def test_dgpo_at_its_reference_is_half_of_advantage_weighted_matching() -> None:
    where, velocity = points(), velocities(distance=0)
    assert where.target is not None
    closed = (where.weight * where.advantage.clamp(-5, 5))[:, None] / D * (velocity[Role.CURRENT] - where.target)
    torch.testing.assert_close(gradient(DGPO(DGPOOptions(kl=0)), where, velocity), closed.detach(), atol=1e-14, rtol=0)


def test_a_clip_of_dgpo_changes_nothing_at_the_policy_that_sampled_and_holds_beyond() -> None:
    where, same = points(), velocities(distance=0)
    free, tight = DGPO(DGPOOptions(kl=0)), DGPO(DGPOOptions(kl=0, clip_range=1e-9))
    torch.testing.assert_close(gradient(tight, where, same), gradient(free, where, same), atol=1e-15, rtol=0)
    moved = velocities()
    assert where.target is not None
    d, old = ((moved[role].detach() - where.target).square().mean(1) for role in (Role.CURRENT, Role.OLD))
    helped = where.advantage * (old - d) > 0
    assert helped.any() and not helped.all()
    assert torch.equal(gradient(tight, where, moved).abs().sum(1) == 0, helped)
    assert free.roles() == {Role.CURRENT, Role.REFERENCE} and Role.OLD in tight.roles()


def test_a_group_of_one_and_a_group_without_advantage_move_nothing_by_preference() -> None:
    where, velocity = points(), velocities()
    still = replace(where, advantage=torch.zeros(N).double())
    assert torch.equal(gradient(DGPO(DGPOOptions(kl=0)), still, velocity), torch.zeros(N, D).double())
    alone = replace(where, group=torch.arange(N))
    assert gradient(DGPO(), alone, velocity).isfinite().all()
    with pytest.raises(VelaturaError, match="carry no group"):
        DGPO().loss(replace(where, group=None), velocity)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("objective", [DGPO(), VelocityKL(), EmaKL(), Anchor(), NormHinge()], ids=lambda o: o.name)
def test_the_poles_of_time_are_finite(objective: PolicyObjective, t: float) -> None:  # type: ignore[type-arg]
    where, velocity = replace(points(), t=torch.full((N,), t).double()), velocities()
    assert objective.loss(where, velocity).value.isfinite()
    assert gradient(objective, where, velocity).isfinite().all()


@pytest.mark.parametrize(
    ("objective", "role"),
    [(VelocityKL(), Role.REFERENCE), (EmaKL(), Role.EMA), (Anchor(), Role.ANCHOR)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_distance_pulls_to_its_role_and_is_0_there(objective: PolicyObjective, role: Role) -> None:  # type: ignore[type-arg]
    where, velocity = points(), velocities()
    closed = 2 / (N * D) * (velocity[Role.CURRENT] - velocity[role]).detach()
    torch.testing.assert_close(gradient(objective, where, velocity), closed, atol=1e-15, rtol=1e-12)
    assert objective.roles() == {Role.CURRENT, role}
    assert objective.loss(where, velocities(distance=0)).value == 0


def test_the_average_lags_as_its_options_say() -> None:
    assert [EmaKL().ema_decay(step) for step in (0, 100, 1000)] == [0.0, 0.1, 0.3]
    assert EmaKL(EmaKLOptions(decay_rate=1.0, decay_max=0.99)).ema_decay(1) == 0.99


def test_the_hinge_is_the_square_of_what_is_above_the_bound() -> None:
    where, velocity = points(), velocities()
    ratio = velocity[Role.CURRENT].norm(dim=1) / velocity[Role.REFERENCE].norm(dim=1)
    closed = (ratio - 1.02).clamp_min(0).square()
    assert (closed > 0).any() and (closed == 0).any()
    torch.testing.assert_close(NormHinge().loss(where, velocity).value, closed.mean(), atol=1e-14, rtol=1e-12)
    (own,) = torch.autograd.grad(closed.mean(), velocity[Role.CURRENT])
    torch.testing.assert_close(gradient(NormHinge(), where, velocity), own, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_a_velocity_of_size_0_or_of_its_references_size_gives_no_gradient_to_the_hinge(margin: float) -> None:
    hinge, where, same = NormHinge(NormHingeOptions(margin=margin)), points(), velocities(distance=0)
    assert torch.equal(gradient(hinge, where, same), torch.zeros(N, D).double())
    zero = torch.zeros(N, D).double()
    none, untrained = same | {Role.CURRENT: zero.clone().requires_grad_()}, same | {Role.REFERENCE: zero}
    assert torch.equal(gradient(hinge, where, none), zero)
    assert torch.equal(gradient(hinge, where, untrained), zero)


def steps(kernel: FlowSde | DanceSde | Cps, v: Tensor) -> Points:
    where = replace(points(), t_next=points().t - 0.2, kernel=kernel, x_next=torch.zeros(N, D).double(), target=None)
    drawn = transition(where, v)
    return replace(where, x_next=drawn.mean + drawn.std * random(N, D, seed=8))


@pytest.mark.parametrize("kernel", [FlowSde(), DanceSde(), Cps()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("convention", ["paper", "flow_grpo_code"])
def test_a_kernel_kl_beside_flow_grpo_is_its_own_option(kernel: FlowSde | DanceSde | Cps, convention: str) -> None:
    velocity = velocities()
    where = steps(kernel, velocity[Role.OLD])
    own = FlowGRPO(FlowGRPOOptions.model_validate({"kl": 0.3, "kl_convention": convention}))
    added = KernelKL(KernelKLOptions.model_validate({"kl_convention": convention}))
    both = gradient(FlowGRPO(), where, velocity) + 0.3 * gradient(added, where, velocity)
    torch.testing.assert_close(gradient(own, where, velocity), both, atol=1e-14, rtol=1e-10)
    loss = added.loss
    assert torch.autograd.gradcheck(lambda v: loss(where, velocity | {Role.CURRENT: v}).value, velocity[Role.CURRENT])


@pytest.mark.parametrize(
    "objective", [DGPO(DGPOOptions(clip_range=0.5)), NormHinge(), VelocityKL()], ids=lambda o: o.name
)
def test_gradients_are_those_of_finite_differences(objective: PolicyObjective) -> None:  # type: ignore[type-arg]
    """Of dgpo with the factor of its group held, as it holds it."""
    velocity, where = velocities(), points()
    if objective.name == "dgpo":  # one point moves, in a group so sharp that the factor is 0 or 1
        objective = DGPO(DGPOOptions(clip_range=0.5, beta=1e6))
    loss = objective.loss
    assert torch.autograd.gradcheck(lambda v: loss(where, velocity | {Role.CURRENT: v}).value, velocity[Role.CURRENT])


def test_adaptive_weights_are_their_formulas() -> None:
    error, t = random(4, 6), torch.tensor([0.2, 0.5, 0.9, 1.0]).double()
    m, size = error.square().mean(1), error.abs().mean(1)
    torch.testing.assert_close(weighted_error(error, t, "adaptive-l1"), t * m / size)
    torch.testing.assert_close(weighted_error(error, t, "ghuber"), 4 * t * ((m + 1e-10) ** 0.25 - 1e-10**0.25))
    torch.testing.assert_close(weighted_error(error, t, "t"), t * weighted_error(error, t, "uniform"))
    grown = error.clone().requires_grad_()
    (own,) = torch.autograd.grad(weighted_error(10 * grown, t, "adaptive-l1").sum(), grown)
    (one,) = torch.autograd.grad(weighted_error(grown, t, "adaptive-l1").sum(), grown)
    torch.testing.assert_close(own, 10 * one)  # of x, not of 10 x: the size of the error itself drops out
    for weighting in ("uniform", "t", "ghuber", "adaptive-l1"):
        assert weighted_error(torch.zeros(4, 6), t, weighting).eq(0).all()  # type: ignore[arg-type]
