"""Guidance policies are tables over roles."""

import pytest
import torch

from velatura.api import GuidancePolicy, Role
from velatura.plugins.guidance.policies import Both, NoGuidance, RolloutOnly, ScaleOptions, TeacherOnly

TIMES = torch.tensor([1.0, 0.5, 0.0])
W = ScaleOptions(scale=2.5)
TABLE = [
    (NoGuidance(), {}),
    (Both(W), dict.fromkeys(Role, 2.5)),
    (RolloutOnly(W), {Role.ROLLOUT: 2.5}),
    (TeacherOnly(W), {Role.TEACHER: 2.5}),
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
