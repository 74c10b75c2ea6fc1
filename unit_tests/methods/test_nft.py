"""DiffusionNFT against closed forms, limits and invariances."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from velatura.api import Points, Role, VelaturaError
from velatura.plugins.objectives.nft import NFT, NFTOptions

N, D = 6, 10


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(t: Tensor | None = None, advantage: Tensor | None = None) -> Points:
    t = torch.linspace(0.1, 1, N).double() if t is None else t
    x0, eps = random(N, 2, D // 2, seed=1), random(N, 2, D // 2, seed=2)
    share = t.reshape(-1, 1, 1)
    return Points(
        x=(1 - share) * x0 + share * eps,
        t=t,
        advantage=random(N, seed=3) * 2 if advantage is None else advantage,
        weight=torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.1]).double(),
        x0=x0,
        target=eps - x0,
    )


def velocities(seed: int = 10) -> dict[Role, Tensor]:
    shape = (N, 2, D // 2)
    return {
        Role.CURRENT: random(*shape, seed=seed).requires_grad_(),
        Role.OLD: random(*shape, seed=seed + 1).requires_grad_(),
        Role.REFERENCE: random(*shape, seed=seed + 2).requires_grad_(),
    }


def gradient(objective: NFT, where: Points, velocity: dict[Role, Tensor]) -> Tensor:
    (result,) = torch.autograd.grad(objective.loss(where, velocity).value, velocity[Role.CURRENT])
    return result


def spread(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


@pytest.mark.parametrize("beta", [0.1, 1.0, 1.7])
def test_the_plain_gradient_is_a_pull_to_old_and_a_push_along_the_advantage(beta: float) -> None:
    where, velocity = points(), velocities()
    r = (where.advantage / 10 + 0.5).clamp(0, 1)
    v, old = velocity[Role.CURRENT].detach(), velocity[Role.OLD].detach()
    assert where.target is not None
    closed = 2 * beta**2 * (v - old) + 2 * beta * spread(2 * r - 1) * (old - where.target)
    got = gradient(NFT(NFTOptions(beta=beta, kl=0, normalise="none")), where, velocity)
    torch.testing.assert_close(got, spread(where.weight) / D * closed, atol=1e-12, rtol=1e-10)


def test_the_adaptive_gradient_divides_each_side_by_its_own_frozen_error() -> None:
    where, velocity, beta = points(), velocities(), 0.7
    v, old = velocity[Role.CURRENT].detach(), velocity[Role.OLD].detach()
    assert where.target is not None and where.x0 is not None
    r, t = spread((where.advantage / 10 + 0.5).clamp(0, 1)), spread(where.t)
    closed = torch.zeros_like(v)
    for share, sign in ((r, 1), (1 - r, -1)):
        side = old + sign * beta * (v - old)
        error = where.x - t * side - where.x0  # the published form, in x_0
        size = error.abs().flatten(1).mean(1)
        closed += 5 / beta * share * (-t * sign * beta) * 2 * error / spread(size)
    got = gradient(NFT(NFTOptions(beta=beta, kl=0)), where, velocity)
    torch.testing.assert_close(got, spread(where.weight) / D * closed, atol=1e-12, rtol=1e-9)


def test_the_error_of_the_estimated_x0_is_t_times_that_of_the_velocity() -> None:
    where, v = points(), velocities()[Role.CURRENT].detach()
    assert where.target is not None and where.x0 is not None
    estimate = where.x - spread(where.t) * v
    torch.testing.assert_close(estimate - where.x0, spread(where.t) * (where.target - v), atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_minimum_is_old_moved_towards_the_target_by_the_advantage(beta: float) -> None:
    where, velocity = points(), velocities()
    r, old = (where.advantage / 10 + 0.5).clamp(0, 1), velocity[Role.OLD].detach()
    assert where.target is not None
    best = old + spread((2 * r - 1) / beta) * (where.target - old)
    got = gradient(
        NFT(NFTOptions(beta=beta, kl=0, normalise="none")), where, {**velocity, Role.CURRENT: best.requires_grad_()}
    )
    assert got.abs().max() < 1e-13


@pytest.mark.parametrize("normalise", ["adaptive", "none"])
@pytest.mark.parametrize("beta", [0.1, 1.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_advantage_at_the_old_policy_gives_exactly_zero_gradient(
    normalise: str, beta: float, dtype: torch.dtype
) -> None:
    where = points(advantage=torch.zeros(N))
    v = velocities()[Role.CURRENT].detach().to(dtype).requires_grad_()
    velocity = {Role.CURRENT: v, Role.OLD: v.detach(), Role.REFERENCE: v.detach()}
    options = NFTOptions.model_validate({"normalise": normalise, "beta": beta})
    assert torch.equal(gradient(NFT(options), where, velocity), torch.zeros_like(v))


@pytest.mark.parametrize("normalise", ["adaptive", "none"])
def test_only_current_gets_a_gradient(normalise: str) -> None:
    velocity = velocities()
    NFT(NFTOptions.model_validate({"normalise": normalise})).loss(points(), velocity).value.backward()
    assert velocity[Role.CURRENT].grad is not None
    assert velocity[Role.OLD].grad is None and velocity[Role.REFERENCE].grad is None


@pytest.mark.parametrize("normalise", ["adaptive", "none"])
@pytest.mark.parametrize("t", [1.0, 1e-3, 1e-12, 0.0])
def test_loss_and_gradient_are_finite_at_both_ends_of_time(normalise: str, t: float) -> None:
    where = replace(points(t=torch.full((N,), t).double()), advantage=torch.linspace(-9, 9, N))
    velocity = {role: v.detach().float().requires_grad_() for role, v in velocities().items()}
    objective = NFT(NFTOptions.model_validate({"normalise": normalise}))
    assert objective.loss(where, velocity).value.isfinite()
    assert gradient(objective, where, velocity).isfinite().all()


def test_a_perfect_prediction_is_finite() -> None:
    where = points()
    assert where.target is not None
    velocity = dict.fromkeys(Role, where.target.clone().requires_grad_())
    assert gradient(NFT(), where, velocity).isfinite().all()


def test_advantages_beyond_the_limit_count_as_the_limit() -> None:
    velocity, objective = velocities(), NFT(NFTOptions(max_advantage=2))
    beyond, at = (points(advantage=torch.full((N,), a)) for a in (100.0, 2.0))
    assert torch.equal(gradient(objective, beyond, velocity), gradient(objective, at, velocity))


def test_learning_from_the_good_alone_leaves_the_others_at_zero_advantage() -> None:
    advantage = torch.tensor([2.0, -1.0, 0.5, -3.0, 0.0, 4.0]).double()
    velocity = velocities()
    told = NFT(NFTOptions(positive_only=True, kl=0.0)).loss(points(advantage=advantage), velocity).value
    good = NFT(NFTOptions(kl=0.0)).loss(points(advantage=advantage.clamp_min(0)), velocity).value
    both = NFT(NFTOptions(kl=0.0)).loss(points(advantage=advantage), velocity).value
    assert torch.equal(told, good) and not torch.allclose(told, both)


def test_without_its_negative_part_it_is_regression_weighted_by_r() -> None:
    where, velocity = points(), velocities()
    half = NFT(NFTOptions(normalise="none", kl=0, negative_part=False))
    r = (where.advantage / 10 + 0.5).clamp(0, 1)
    assert where.target is not None
    closed = spread(where.weight * 2 * r) * (velocity[Role.CURRENT].detach() - where.target) / D
    torch.testing.assert_close(gradient(half, where, velocity), closed, atol=1e-12, rtol=1e-9)
    assert NFT().requires.contrast and not half.requires.contrast  # the self-check does not hold it to a contrast


def test_the_kl_adds_its_own_gradient_and_nothing_else() -> None:
    where, velocity = points(), velocities()
    plain, held = (gradient(NFT(NFTOptions(kl=kl)), where, velocity) for kl in (0.0, 0.3))
    distance = velocity[Role.CURRENT].detach() - velocity[Role.REFERENCE].detach()
    torch.testing.assert_close(held - plain, spread(where.weight) * 2 * 0.3 / D * distance, atol=1e-12, rtol=1e-9)


def test_the_loss_does_not_depend_on_the_cut_into_micro_batches() -> None:
    where, velocity, objective = points(), velocities(), NFT()
    parts = []
    for rows in (slice(0, 2), slice(2, N)):
        cut = Points(**{name: getattr(where, name)[rows] for name in ("x", "t", "advantage", "weight", "x0", "target")})
        parts.append(objective.loss(cut, {role: v[rows] for role, v in velocity.items()}).value)
    torch.testing.assert_close(sum(parts), objective.loss(where, velocity).value)


def test_points_of_weight_zero_change_nothing() -> None:
    where, velocity = points(), velocities()
    weight = where.weight.clone()
    weight[2] = 0
    some, other = (
        replace(where, weight=weight, advantage=where.advantage.index_fill(0, torch.tensor(2), a)) for a in (0, 4)
    )
    assert torch.equal(gradient(NFT(), some, velocity), gradient(NFT(), other, velocity))
    assert (gradient(NFT(), some, velocity)[2] == 0).all()


def test_no_reference_is_asked_for_without_a_kl() -> None:
    assert NFT(NFTOptions(kl=0)).roles() == {Role.CURRENT, Role.OLD}
    assert NFT().roles() == {Role.CURRENT, Role.OLD, Role.REFERENCE}
    velocity = velocities()
    del velocity[Role.REFERENCE]
    assert NFT(NFTOptions(kl=0)).loss(points(), velocity).value.isfinite()


def test_the_old_policy_follows_closely_at_first_and_lags_later() -> None:
    assert [NFT().old_decay(step) for step in (0, 100, 500, 10_000)] == [0.0, 0.1, 0.5, 0.5]


def test_metrics_are_plain_scalars() -> None:
    velocity = velocities()
    velocity[Role.REFERENCE] = velocity[Role.CURRENT].detach()
    metrics = NFT().loss(points(advantage=torch.full((N,), 5.0)), velocity).metrics
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert metrics["contrast"] == pytest.approx(1)
    assert metrics["norm_ratio"] == pytest.approx(1)
    assert metrics["kl"] == 0


def test_points_without_a_target_are_refused() -> None:
    with pytest.raises(VelaturaError, match="carry no target"):
        NFT().loss(replace(points(), target=None), velocities())


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"max_advantage": -1}, {"normalise": "l2"}, {"old_decay_max": 1}])
def test_impossible_nft_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NFTOptions.model_validate(wrong)
