"""Guidance policies are tables over roles."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from velatura.api import Conditioning, GuidancePolicy, ModelAdapter, Role
from velatura.core.folding import strongest_scale
from velatura.core.rollout import guided_velocity
from velatura.plugins.guidance.policies import (
    Both,
    DetachedUncond,
    Interval,
    IntervalOptions,
    NoGuidance,
    RolloutOnly,
    ScaleOptions,
    TeacherOnly,
)

TIMES = torch.tensor([1.0, 0.5, 0.0])
W = ScaleOptions(scale=2.5)
TABLE = [
    (NoGuidance(), {}),
    (DetachedUncond(W), dict.fromkeys(Role, 2.5)),
    (Both(W), dict.fromkeys(Role, 2.5)),
    (RolloutOnly(W), {Role.ROLLOUT: 2.5}),
    (TeacherOnly(W), {Role.TEACHER: 2.5, Role.ANCHOR: 2.5}),
]


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(("policy", "guided"), TABLE, ids=lambda p: getattr(p, "name", ""))
def test_a_policy_is_its_row_of_the_table(
    policy: GuidancePolicy,  # type: ignore[type-arg]
    guided: dict[Role, float],
    role: Role,
) -> None:
    assert torch.equal(policy.scale(role, TIMES), torch.full((3,), guided.get(role, 1.0)))


@pytest.mark.parametrize("policy", [Both, RolloutOnly, TeacherOnly])
@pytest.mark.parametrize("role", list(Role))
def test_scale_one_never_needs_the_null_branch(policy: type[Both], role: Role) -> None:
    assert not (policy(ScaleOptions(scale=1)).scale(role, TIMES) != 1).any()


def test_hybrid_guidance_trains_on_conditional_velocities_alone() -> None:
    for role in (Role.CURRENT, Role.OLD, Role.REFERENCE):
        assert not (RolloutOnly(W).scale(role, TIMES) != 1).any()


@pytest.mark.parametrize(
    ("roles", "plain"), [("both", Both), ("rollout-only", RolloutOnly), ("teacher-only", TeacherOnly)]
)
def test_an_interval_is_another_policy_for_a_part_of_the_time(roles: str, plain: type[Both]) -> None:
    times = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.05])
    options = IntervalOptions.model_validate({"scale": 2.5, "low": 0.1, "high": 0.8, "roles": roles})
    for role in Role:
        expected = plain(W).scale(role, times)
        expected[[0, 4]] = 1.0
        assert torch.equal(Interval(options).scale(role, times), expected)
        assert strongest_scale(Interval(options), role) == strongest_scale(plain(W), role)


def test_the_scale_of_a_policy_is_found_where_it_guides() -> None:
    early = Interval(IntervalOptions(scale=3, low=0.8, high=0.9))
    assert strongest_scale(early, Role.ROLLOUT) == 3
    assert strongest_scale(early, Role.CURRENT) == 1
    assert strongest_scale(Both(ScaleOptions(scale=0.5)), Role.CURRENT) == 0.5


def test_an_interval_without_times_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"is above high 0\.2: no time"):
        IntervalOptions(low=0.9, high=0.2)


class TwoWeights(nn.Module):
    """A network with a weight of its own for each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Parameter(torch.tensor([2.0, 3.0]))


class Branches(Conditioning):
    """Which weight answers."""

    def __init__(self, branch: int) -> None:
        self.branch = branch

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(("policy", "null"), [(DetachedUncond(W), 0.0), (Both(W), -1.5)])
def test_a_detached_unconditional_branch_has_the_same_velocity_and_no_gradient(policy: Both, null: float) -> None:
    net = TwoWeights()

    class Adapter:
        def velocity(self, net: TwoWeights, x: Tensor, t: Tensor, cond: Branches, rows: Tensor) -> Tensor:
            return net.branch[cond.branch] * x

        guide = ModelAdapter.guide

    x = torch.ones(2, 3)
    v, rows = guided_velocity(
        net, Adapter(), policy, x, torch.full((2,), 0.5), Branches(0), Branches(1), torch.zeros(2, dtype=torch.int64),  # type: ignore[arg-type]
        role=Role.CURRENT, limit=8,
    )  # fmt: skip
    assert rows == 4
    torch.testing.assert_close(v, (3.0 + 2.5 * (2.0 - 3.0)) * x)
    v.mean().backward()
    torch.testing.assert_close(net.branch.grad, torch.tensor([2.5, null]))
