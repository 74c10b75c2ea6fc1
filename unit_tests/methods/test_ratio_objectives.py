"""Objectives with a ratio per step against closed forms and finite differences; reward-weighted regression."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from velatura.api import Kernel, Points, PolicyObjective, Role, VelaturaError
from velatura.plugins.objectives.flow_grpo import FlowGRPO, FlowGRPOOptions
from velatura.plugins.objectives.grpo_guard import GRPOGuard, GRPOGuardOptions
from velatura.plugins.objectives.ratio import draw_of, transition
from velatura.plugins.objectives.rwr import RWR, RWROptions
from velatura.plugins.objectives.sft import SFT
from velatura.schedulers.kernels import Ode
from velatura.schedulers.stochastic import Cps, DanceSde, FlowSde

N, D = 5, 6
KERNELS = [FlowSde(), DanceSde(), Cps()]
OBJECTIVES: list[PolicyObjective] = [  # type: ignore[type-arg]
    FlowGRPO(FlowGRPOOptions(clip_range=0.3)),
    GRPOGuard(GRPOGuardOptions(clip_range=0.3)),
]
A = [-9.0, -2.0, 0.0, 1.0, 7.0]
named = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
both = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(kernel: Kernel, v_old: Tensor, noise: Tensor | None = None) -> Points:  # type: ignore[type-arg]
    """Steps that the old policy drew."""
    bare = Points(
        x=random(N, D, seed=1),
        t=torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1]).double(),
        t_next=torch.tensor([0.9, 0.6, 0.3, 0.1, 0.02]).double(),
        advantage=torch.tensor(A).double(),
        weight=torch.full((N,), 1 / N, dtype=torch.float64),
        x_next=torch.zeros(N, D).double(),
        kernel=kernel,
    )
    drawn = transition(bare, v_old)
    x_next = drawn.mean + drawn.std * (random(N, D, seed=2) if noise is None else noise)
    return replace(bare, x_next=x_next, log_prob=kernel.log_prob(x_next, drawn))


def velocities(distance: float = 0.3) -> dict[Role, Tensor]:
    old = random(N, D, seed=3)
    return {
        Role.CURRENT: (old + distance * random(N, D, seed=4)).requires_grad_(),
        Role.OLD: old,
        Role.REFERENCE: random(N, D, seed=5),
    }


def gradient(objective: PolicyObjective, where: Points, velocity: dict[Role, Tensor]) -> Tensor:  # type: ignore[type-arg]
    (result,) = torch.autograd.grad(objective.loss(where, velocity).value, velocity[Role.CURRENT])
    return result


def gain(where: Points) -> Tensor:
    """d mu / d v, [N 1]."""
    one, zero = (transition(where, torch.full((N, D), value).double()) for value in (1.0, 0.0))
    return (one.mean - zero.mean)[:, :1]


@named
def test_the_guards_ratio_is_the_centred_and_scaled_one(kernel: Kernel) -> None:  # type: ignore[type-arg]
    velocity = velocities()
    where = points(kernel, velocity[Role.OLD])
    draw = draw_of(where, velocity)
    delta, s = draw.current.mean - draw.old.mean, draw.old.std
    centred = (draw.log_ratio + (delta**2 / (2 * s**2)).mean(1)) * s[:, 0]
    torch.testing.assert_close(centred, (delta * random(N, D, seed=2)).mean(1), atol=1e-12, rtol=1e-10)
    ratio = GRPOGuard(GRPOGuardOptions(clip_range=0.9)).loss(where, velocity).metrics["ratio"]
    torch.testing.assert_close(ratio, centred.exp().mean(), atol=1e-12, rtol=1e-10)


@named
def test_a_plain_ratio_drifts_below_one_and_the_guards_does_not(kernel: Kernel) -> None:  # type: ignore[type-arg]
    velocity, noise = velocities(), random(N, D, seed=6)
    plain, guarded = [], []
    for eps in (noise, -noise):
        where = points(kernel, velocity[Role.OLD], eps)
        draw = draw_of(where, velocity)
        plain.append(draw.log_ratio)
        guarded.append(((draw.current.mean - draw.old.mean) * eps).mean(1))
    drift = ((draw.current.mean - draw.old.mean) / draw.old.std).square().mean(1)
    torch.testing.assert_close(plain[0] + plain[1], -drift, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(guarded[0] + guarded[1], torch.zeros(N).double(), atol=1e-15, rtol=0)


@named
def test_at_the_policy_that_sampled_the_gradient_is_the_score_times_the_advantage(kernel: Kernel) -> None:  # type: ignore[type-arg]
    velocity = velocities(distance=0)
    where = points(kernel, velocity[Role.OLD])
    draw, a = draw_of(where, velocity), torch.tensor(A).double().clamp(-5, 5)
    noise = (draw.x_next - draw.old.mean).detach() / draw.old.std
    for objective, scale in ((OBJECTIVES[0], 1 / draw.old.std), (OBJECTIVES[1], torch.ones(N, 1).double())):
        assert objective.loss(where, velocity).metrics["ratio"] == 1
        closed = -(where.weight * a)[:, None] * noise * scale * gain(where) / D
        torch.testing.assert_close(gradient(objective, where, velocity), closed, atol=1e-13, rtol=1e-9)


@named
@both
@pytest.mark.parametrize("convention", ["paper", "flow_grpo_code"])
def test_gradients_are_those_of_finite_differences(
    objective: PolicyObjective,  # type: ignore[type-arg]
    kernel: Kernel,  # type: ignore[type-arg]
    convention: str,
) -> None:
    velocity = velocities()
    where = points(kernel, velocity[Role.OLD])
    options = {"clip_range": 0.3, "kl": 0.05, "kl_convention": convention}
    loss = type(objective)(type(objective.options).model_validate(options)).loss
    assert torch.autograd.gradcheck(lambda v: loss(where, velocity | {Role.CURRENT: v}).value, velocity[Role.CURRENT])


@both
def test_a_ratio_beyond_the_clip_gives_no_gradient_where_it_helps(objective: PolicyObjective) -> None:  # type: ignore[type-arg]
    tight = type(objective)(type(objective.options).model_validate({"clip_range": 1e-9}))
    velocity = velocities()
    where = points(FlowSde(), velocity[Role.OLD])
    draw = draw_of(where, velocity)
    noise = (draw.x_next - draw.old.mean) / draw.old.std
    log_ratio = (
        draw.log_ratio if objective.name == "flow-grpo" else ((draw.current.mean - draw.old.mean) * noise).mean(1)
    )
    helped = torch.tensor(A) * log_ratio.detach() > 0
    still = gradient(tight, where, velocity).abs().sum(1) == 0
    assert helped.any() and not helped.all()
    assert torch.equal(still, helped | (torch.tensor(A) == 0))


@named
@both
def test_zero_advantage_gives_exactly_no_gradient(objective: PolicyObjective, kernel: Kernel) -> None:  # type: ignore[type-arg]
    velocity = velocities()
    where = replace(points(kernel, velocity[Role.OLD]), advantage=torch.zeros(N).double())
    assert torch.equal(gradient(objective, where, velocity), torch.zeros(N, D).double())


@named
def test_the_kl_is_that_of_the_two_steps(kernel: Kernel) -> None:  # type: ignore[type-arg]
    velocity = velocities()
    where = points(kernel, velocity[Role.OLD])
    draw, other = draw_of(where, velocity), transition(where, velocity[Role.REFERENCE])
    stock = torch.distributions.kl_divergence(
        torch.distributions.Normal(draw.current.mean, draw.current.std.expand(N, D)),
        torch.distributions.Normal(other.mean, other.std.expand(N, D)),
    ).mean(1)
    paper, code = (
        FlowGRPO(FlowGRPOOptions(kl=1.0, kl_convention=name)).loss(where, velocity).metrics["kl"]
        for name in ("paper", "flow_grpo_code")
    )
    assert where.t_next is not None
    torch.testing.assert_close(paper, stock.mean(), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(code, (stock * (where.t - where.t_next)).mean(), atol=1e-12, rtol=1e-10)


@both
def test_the_gap_to_the_rollout_is_what_the_rollout_said(objective: PolicyObjective) -> None:  # type: ignore[type-arg]
    velocity = velocities()
    where = points(FlowSde(), velocity[Role.OLD])
    assert objective.loss(where, velocity).metrics["rollout_gap"] == 0
    assert where.log_prob is not None
    off = replace(where, log_prob=where.log_prob - 0.25)
    torch.testing.assert_close(objective.loss(off, velocity).metrics["rollout_gap"], torch.tensor(0.25).double())


@both
def test_a_reference_is_asked_for_only_with_a_kl(objective: PolicyObjective) -> None:  # type: ignore[type-arg]
    assert objective.roles() == {Role.CURRENT, Role.OLD}
    with_kl = type(objective)(type(objective.options).model_validate({"kl": 0.1}))
    assert with_kl.roles() == {Role.CURRENT, Role.OLD, Role.REFERENCE}


@both
def test_only_current_gets_a_gradient(objective: PolicyObjective) -> None:  # type: ignore[type-arg]
    velocity = {role: v.detach().requires_grad_() for role, v in velocities().items()}
    kl = type(objective)(type(objective.options).model_validate({"kl": 0.1}))
    kl.loss(points(FlowSde(), velocities()[Role.OLD]), velocity).value.backward()
    assert velocity[Role.CURRENT].grad is not None
    assert velocity[Role.OLD].grad is None and velocity[Role.REFERENCE].grad is None


@both
def test_points_without_noise_are_refused(objective: PolicyObjective) -> None:  # type: ignore[type-arg]
    velocity = velocities()
    where = points(FlowSde(), velocity[Role.OLD])
    for wrong in (replace(where, kernel=None), replace(where, kernel=Ode()), replace(where, x_next=None)):
        with pytest.raises(VelaturaError, match="steps that drew noise, but the points carry none"):
            objective.loss(wrong, velocity)


def regression() -> Points:
    return replace(points(FlowSde(), random(N, D)), target=random(N, D, seed=7), kernel=None, x_next=None)


def test_reward_weighted_regression_is_matching_weighted_by_the_exponential_of_the_advantage() -> None:
    where, velocity = regression(), velocities()
    objective = RWR(RWROptions(temperature=2.0, max_weight=5.0, kl=0))
    weight = (torch.tensor(A).double() / 2).exp().clamp_max(5.0)
    assert (weight == 5).any() and (weight < 5).any() and where.target is not None
    closed = (where.weight * 2 * weight)[:, None] * (velocity[Role.CURRENT].detach() - where.target) / D
    torch.testing.assert_close(gradient(objective, where, velocity), closed, atol=1e-14, rtol=1e-11)
    v, anchor = velocity[Role.CURRENT].detach(), velocity[Role.REFERENCE]
    with_kl = gradient(RWR(RWROptions(temperature=2.0, max_weight=5.0, kl=0.3)), where, velocity)
    torch.testing.assert_close(with_kl - closed, 2 * 0.3 / (N * D) * (v - anchor), atol=1e-14, rtol=1e-10)


def test_without_a_difference_in_reward_it_is_supervised_matching() -> None:
    where, velocity = replace(regression(), advantage=torch.zeros(N).double()), velocities()
    objective = RWR(RWROptions(kl=0))
    assert torch.equal(gradient(objective, where, velocity), gradient(SFT(), where, velocity))


def test_regression_asks_for_a_reference_only_with_a_kl_and_pulls_to_it() -> None:
    assert RWR(RWROptions(kl=0)).roles() == {Role.CURRENT} and RWR().roles() == {Role.CURRENT, Role.REFERENCE}
    velocity = velocities()
    where = replace(points(FlowSde(), velocity[Role.OLD]), target=random(N, D, seed=7))
    v, anchor = velocity[Role.CURRENT].detach(), velocity[Role.REFERENCE]
    pull = gradient(RWR(RWROptions(kl=0.3)), where, velocity) - gradient(RWR(RWROptions(kl=0)), where, velocity)
    torch.testing.assert_close(pull, 0.3 * 2 / (N * D) * (v - anchor), atol=1e-14, rtol=1e-9)


def test_huge_advantages_stay_finite() -> None:
    where, velocity = replace(regression(), advantage=torch.full((N,), 1e6)), velocities()
    assert gradient(RWR(RWROptions(temperature=0.01)), where, velocity).isfinite().all()
