"""Formulas against closed forms and finite differences, and that the components keep their contracts."""

import pytest
import torch
from velatura_matching.mode import LARGEST, Mode, ModeOptions, chances, mode
from velatura_matching.ram import RAM, RAMOptions

from velatura.api import Points, Role, VelaturaError
from velatura.testing import parametrize_with_checks


@parametrize_with_checks("matching")
def test_conformance(check):
    check()


def points(advantage, weight=None):
    count = len(advantage)
    x0, noise = torch.randn(2, count, 3, 2, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.9, 0.2, count)
    weights = torch.full((count,), 1 / count) if weight is None else weight
    return Points(x=x0, t=t, advantage=torch.tensor(advantage), weight=weights, x0=x0, target=noise - x0)


def velocities(count, equal=False):
    v, old, reference = torch.randn(3, count, 3, 2, generator=torch.Generator().manual_seed(1))
    return {Role.CURRENT: v.clone().requires_grad_(), Role.OLD: v if equal else old,
            Role.REFERENCE: v if equal else reference}  # fmt: skip


def test_the_least_loss_is_at_the_corrected_target():
    at, roles = points([1.0, -2.0]), velocities(2)
    shift = 3 * at.advantage[:, None, None] * (at.target - roles[Role.OLD])
    best = {**roles, Role.CURRENT: roles[Role.REFERENCE] + shift}
    assert float(RAM(RAMOptions(strength=3)).loss(at, best).value) == pytest.approx(0, abs=1e-9)


def test_the_gradient_is_that_of_the_formula_and_of_finite_differences():
    at, roles = points([0.5, -1.0]), velocities(2, equal=True)
    objective, v = RAM(RAMOptions(strength=2)), roles[Role.CURRENT]
    (gradient,) = torch.autograd.grad(objective.loss(at, roles).value, v)
    expected = -2 * 2 * at.advantage[:, None, None] * (at.target - v) / 6 / 2  # 6 latent dimensions, weight 1/2
    assert torch.allclose(gradient, expected.detach(), atol=1e-6)
    step = torch.zeros_like(v)
    step[1, 2, 0] = 1e-2
    ends = [float(objective.loss(at, {**roles, Role.CURRENT: (v + s * step).detach()}).value) for s in (1, -1)]
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(gradient[1, 2, 0]), rel=1e-2)


def test_advantages_are_clipped():
    roles = velocities(1)
    objective = RAM(RAMOptions(max_advantage=2.0))
    assert torch.equal(objective.loss(points([9.0]), roles).value, objective.loss(points([2.0]), roles).value)


def test_visited_states_are_refused():
    at = points([1.0])
    bare = Points(x=at.x, t=at.t, advantage=at.advantage, weight=at.weight)
    with pytest.raises(VelaturaError, match="these points have none"):
        RAM().loss(bare, velocities(1))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, LARGEST])
def test_steps_are_as_likely_as_uniform_draws_fall_into_them(scale):
    grid = torch.tensor([1.0, 0.9, 0.6, 0.5, 0.2, 0.0])
    u = (torch.arange(200_000).double() + 0.5) / 200_000
    inside = torch.bucketize(-mode(u, scale), -grid.double()) - 1
    expected = torch.bincount(inside.clamp(0, 4), minlength=5) / len(u)
    assert torch.allclose(chances(grid, scale), expected.double(), atol=1e-4)


def test_without_a_scale_every_step_is_as_likely_as_it_is_long():
    assert torch.allclose(chances(torch.tensor([1.0, 0.5, 0.4, 0.0]), 0.0), torch.tensor([0.5, 0.1, 0.4]).double())


def test_a_large_scale_favours_the_middle_and_keeps_both_ends():
    likely = chances(torch.linspace(1, 0, 6), 1.29)
    assert likely.argmax() == 2
    assert likely.min() > 0.05


def test_steps_are_drawn_by_their_chances():
    grid, sampler = torch.tensor([1.0, 0.5, 0.0]), Mode(ModeOptions(count=1, scale=0.0))
    generator = torch.Generator().manual_seed(0)
    picks = torch.cat([sampler.plan(grid[[0, 1, 2]] ** 2, generator).train for _ in range(200)])
    assert picks.float().mean() == pytest.approx(0.25, abs=0.1)  # three standard errors
