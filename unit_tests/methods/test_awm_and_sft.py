"""Advantage-weighted and supervised flow matching against closed forms; and a small world in which both learn."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from velatura.api import Points, PolicyObjective, Role
from velatura.plugins.objectives.awm import AWM, AWMOptions
from velatura.plugins.objectives.nft import NFT, NFTOptions
from velatura.plugins.objectives.sft import SFT

N, D = 6, 8
ROLES = (Role.CURRENT, Role.OLD, Role.REFERENCE)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(t: Tensor | None = None) -> Points:
    return Points(
        x=random(N, D, seed=1),
        t=torch.linspace(0.05, 1, N).double() if t is None else t,
        advantage=torch.tensor([-9.0, -2.0, -0.5, 0.0, 1.0, 7.0]).double(),
        weight=torch.full((N,), 1 / N, dtype=torch.float64),
        target=random(N, D, seed=2),
    )


def velocities() -> dict[Role, Tensor]:
    return {role: random(N, D, seed=10 + i).requires_grad_() for i, role in enumerate(ROLES)}


def gradient(objective: PolicyObjective, where: Points, velocity: dict[Role, Tensor]) -> Tensor:  # type: ignore[type-arg]
    (result,) = torch.autograd.grad(objective.loss(where, velocity).value, velocity[Role.CURRENT])
    return result


def on_policy(**options: object) -> AWM:
    return AWM(AWMOptions.model_validate({"kl": 0, "ema_kl": 0, **options}))


@pytest.mark.parametrize("weighting", ["uniform", "t", "ghuber"])
def test_the_on_policy_gradient_is_advantage_weighted_flow_matching(weighting: str) -> None:
    where, velocity = points(), {Role.CURRENT: velocities()[Role.CURRENT]}
    assert where.target is not None
    difference = velocity[Role.CURRENT].detach() - where.target
    m = difference.square().mean(1)
    w = {"uniform": torch.ones(N).double(), "t": where.t, "ghuber": where.t * (m + 1e-10) ** -0.75}[weighting]
    a = where.advantage.clamp(-5, 5) / 5
    closed = (where.weight * 2 * a * w)[:, None] * difference / D
    torch.testing.assert_close(
        gradient(on_policy(weighting=weighting), where, velocity), closed, atol=1e-13, rtol=1e-10
    )


def test_at_the_old_policy_the_gradient_is_that_of_nft_up_to_a_constant() -> None:
    where, v = points(), velocities()[Role.CURRENT]
    velocity = {Role.CURRENT: v, Role.OLD: v.detach()}
    nft = gradient(NFT(NFTOptions(beta=0.4, kl=0, normalise="none")), where, velocity)
    torch.testing.assert_close(nft, 0.4 * gradient(on_policy(), where, velocity), atol=1e-13, rtol=1e-10)


def test_with_an_ema_kl_of_one_the_gradient_is_that_of_nft_everywhere() -> None:
    where, velocity = points(), velocities()
    nft = gradient(NFT(NFTOptions(beta=1, kl=0, normalise="none")), where, velocity)
    assert where.target is not None
    a = (where.advantage.clamp(-5, 5) / 5)[:, None]
    moved = (where.weight[:, None] * 2 * a / D) * (velocity[Role.CURRENT] - velocity[Role.OLD]).detach()
    awm = gradient(on_policy(ema_kl=1), where, velocity)
    torch.testing.assert_close(awm - moved, nft, atol=1e-13, rtol=1e-9)  # they differ by the curvature a alone


def test_the_ratio_to_old_is_one_where_old_is_current() -> None:
    where, v = points(), velocities()[Role.CURRENT]
    velocity = {Role.CURRENT: v, Role.OLD: v.detach()}
    loss = on_policy(clip_range=1e-4).loss(where, velocity)
    assert loss.metrics["log_ratio"] == 0 and loss.metrics["clipped"] == 0
    torch.testing.assert_close(
        gradient(on_policy(clip_range=1e-4), where, velocity), gradient(on_policy(), where, velocity)
    )


def test_off_policy_points_are_weighted_by_their_ratio_until_it_is_clipped() -> None:
    where, velocity = points(), velocities()
    assert where.target is not None
    v, old = (velocity[role].detach() for role in (Role.CURRENT, Role.OLD))
    ratio = ((old - where.target).square().mean(1) - (v - where.target).square().mean(1)).exp()
    a = where.advantage.clamp(-5, 5) / 5
    beyond = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    assert beyond.any() and not beyond.all()
    closed = (where.weight * 2 * a * ratio.where(~beyond, 0))[:, None] * (v - where.target) / D
    torch.testing.assert_close(gradient(on_policy(clip_range=0.2), where, velocity), closed, atol=1e-13, rtol=1e-9)


def test_each_kl_adds_its_own_gradient() -> None:
    where, velocity = points(), velocities()
    bare, v = gradient(on_policy(), where, velocity), velocity[Role.CURRENT].detach()
    for name, role in (("kl", Role.REFERENCE), ("ema_kl", Role.OLD)):
        added = gradient(on_policy(**{name: 0.4}), where, velocity) - bare
        torch.testing.assert_close(added, 2 * 0.4 / (N * D) * (v - velocity[role].detach()), atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({}, set()),
        ({"kl": 1e-3}, {Role.REFERENCE}),
        ({"ema_kl": 1.0}, {Role.OLD}),
        ({"clip_range": 0.1}, {Role.OLD}),
        ({"clip_range": 0.1, "kl": 1.0, "ema_kl": 1.0}, {Role.OLD, Role.REFERENCE}),
    ],
)
def test_awm_asks_only_for_the_roles_its_options_use(options: dict[str, float], roles: set[Role]) -> None:
    objective = on_policy(**options)
    assert objective.roles() == {Role.CURRENT, *roles}
    velocity = {role: v for role, v in velocities().items() if role in objective.roles()}
    assert objective.loss(points(), velocity).value.isfinite()


@pytest.mark.parametrize("weighting", ["uniform", "t", "ghuber"])
@pytest.mark.parametrize("clip_range", [None, 0.1])
def test_zero_advantage_at_old_and_reference_gives_exactly_zero_gradient(
    weighting: str, clip_range: float | None
) -> None:
    where, v = replace(points(), advantage=torch.zeros(N)), velocities()[Role.CURRENT]
    velocity = {Role.CURRENT: v, Role.OLD: v.detach(), Role.REFERENCE: v.detach()}
    objective = AWM(AWMOptions.model_validate({"weighting": weighting, "clip_range": clip_range}))
    assert torch.equal(gradient(objective, where, velocity), torch.zeros_like(v))


@pytest.mark.parametrize("weighting", ["uniform", "t", "ghuber"])
@pytest.mark.parametrize("t", [1.0, 1e-12, 0.0])
def test_awm_is_finite_at_both_ends_of_time_and_at_a_perfect_prediction(weighting: str, t: float) -> None:
    where, velocity = points(t=torch.full((N,), t).double()), velocities()
    objective = AWM(AWMOptions.model_validate({"weighting": weighting, "clip_range": 0.1}))
    assert gradient(objective, where, velocity).isfinite().all()
    assert where.target is not None
    velocity[Role.CURRENT] = where.target.clone().requires_grad_()
    assert gradient(objective, where, velocity).isfinite().all()


def test_only_current_gets_a_gradient() -> None:
    velocity = velocities()
    AWM(AWMOptions(clip_range=0.1)).loss(points(), velocity).value.backward()
    assert velocity[Role.CURRENT].grad is not None
    assert velocity[Role.OLD].grad is None and velocity[Role.REFERENCE].grad is None


def test_the_old_policy_of_awm_is_current_at_rate_zero() -> None:
    assert AWM(AWMOptions(old_decay_rate=0)).old_decay(1000) == 0
    assert AWM().old_decay(1000) == 0.3


def test_supervised_flow_matching_is_the_squared_distance_to_the_target() -> None:
    where, velocity = points(), {Role.CURRENT: velocities()[Role.CURRENT]}
    assert where.target is not None
    difference = velocity[Role.CURRENT].detach() - where.target
    torch.testing.assert_close(SFT().loss(where, velocity).value.detach(), difference.square().mean())
    torch.testing.assert_close(gradient(SFT(), where, velocity), 2 * difference / (N * D), atol=1e-13, rtol=1e-10)
    assert SFT().roles() == {Role.CURRENT} and not SFT.requires.advantage


def test_supervised_flow_matching_ignores_advantages() -> None:
    where, velocity = points(), velocities()
    assert torch.equal(
        SFT().loss(where, velocity).value, SFT().loss(replace(where, advantage=-where.advantage), velocity).value
    )


@pytest.mark.parametrize(
    "objective", [NFT(NFTOptions(kl=0)), on_policy(ema_kl=1.0), on_policy(ema_kl=1.0, weighting="t")]
)
def test_a_few_steps_on_standard_normal_samples_move_them_towards_the_reward(objective: PolicyObjective) -> None:  # type: ignore[type-arg]
    """The policy is the exact flow of N(-theta, 1), theta enters as a constant in v, the reward is x_0: theta falls."""
    theta, generator = torch.zeros((), dtype=torch.float64, requires_grad=True), torch.Generator().manual_seed(0)
    for _ in range(20):
        x0, eps = torch.randn(2, 512, 1, generator=generator, dtype=torch.float64)
        t = torch.rand(512, generator=generator, dtype=torch.float64)[:, None]
        x, shifted = (1 - t) * (x0 - theta.detach()) + t * eps, x0 - theta.detach()
        advantage = ((shifted - shifted.mean()) / shifted.std()).flatten()
        exact = (2 * t - 1) / ((1 - t) ** 2 + t**2) * (x + (1 - t) * theta.detach())
        where = Points(
            x=x, t=t.flatten(), advantage=advantage, weight=torch.full((512,), 1 / 512), target=eps - shifted
        )
        current = exact + theta
        (slope,) = torch.autograd.grad(
            objective.loss(where, {Role.CURRENT: current, Role.OLD: current.detach()}).value, theta
        )
        theta = (theta - 0.5 * slope).detach().requires_grad_()
    assert theta < -0.3
