"""On-policy distillation: zero at agreement, guidance folded in, weights, routing."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from velatura.api import Points, Prompt, Role, VelaturaError
from velatura.plugins.distillers.velocity_match import VelocityMatch, VelocityMatchOptions
from velatura.plugins.guidance.policies import ScaleOptions, TeacherOnly
from velatura.schedulers.kernels import Ode

N, D = 5, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(**changes: Tensor | None) -> Points:
    t = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1]).double()
    t_next = torch.tensor([0.9, 0.7, 0.4, 0.1, 0.0]).double()
    values = {"x": random(N, D), "t": t, "t_next": t_next, "advantage": torch.zeros(N), "weight": torch.full((N,), 0.2)}
    return Points(**{**values, **changes})  # type: ignore[arg-type]


def test_a_student_that_agrees_with_its_teacher_has_zero_loss_and_gradient() -> None:
    student = random(N, D, seed=1).requires_grad_()
    loss = VelocityMatch().loss(points(), {Role.CURRENT: student, Role.TEACHER: student.detach()})
    loss.value.backward()
    assert loss.value == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("weight", ["uniform", "dt", "dt2"])
def test_the_gradient_is_the_weighted_difference_of_velocities(weight: str) -> None:
    where, student, teacher = points(), random(N, D, seed=1).requires_grad_(), random(N, D, seed=2).requires_grad_()
    objective = VelocityMatch(VelocityMatchOptions.model_validate({"weight": weight}))
    objective.loss(where, {Role.CURRENT: student, Role.TEACHER: teacher}).value.backward()
    assert where.t_next is not None
    step = where.t - where.t_next
    omega = {"uniform": torch.ones(N), "dt": step, "dt2": step**2 / 2}[weight]
    closed = (0.2 * omega)[:, None] * 2 / D * (student - teacher).detach()
    torch.testing.assert_close(student.grad, closed)
    assert teacher.grad is None


def test_dt_weights_integrate_over_time_on_any_grid() -> None:
    """A constant distance of 1 integrates to 1 over t in [0, 1], however the grid is shifted."""
    where = points(weight=torch.ones(N).double())
    student, teacher = torch.ones(N, D).double(), torch.zeros(N, D).double()
    value = (
        VelocityMatch(VelocityMatchOptions(weight="dt"))
        .loss(where, {Role.CURRENT: student, Role.TEACHER: teacher})
        .value
    )
    torch.testing.assert_close(value, torch.tensor(1.0).double())


def test_a_weight_by_step_needs_the_next_time() -> None:
    velocity = {Role.CURRENT: random(N, D), Role.TEACHER: random(N, D)}
    with pytest.raises(VelaturaError, match="weight: dt needs the next time"):
        VelocityMatch(VelocityMatchOptions(weight="dt")).loss(points(t_next=None), velocity)
    assert VelocityMatch().loss(points(t_next=None), velocity).value == 0


def test_bf16_velocities_are_compared_in_fp32() -> None:
    teacher = torch.full((N, D), 1.0, dtype=torch.bfloat16)
    student = torch.full((N, D), 1.0078125, dtype=torch.bfloat16)  # one bf16 step above
    value = VelocityMatch().loss(points(), {Role.CURRENT: student, Role.TEACHER: teacher}).value
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(0.0078125**2)


def conditional(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + 1) * t - 0.3 * x


def unconditional(x: Tensor, t: Tensor) -> Tensor:
    return 0.2 * x - t


def guided_teacher(x: Tensor, t: Tensor) -> Tensor:
    w = TeacherOnly(ScaleOptions(scale=3)).scale(Role.TEACHER, t)
    return unconditional(x, t) + w * (conditional(x, t) - unconditional(x, t))


def trajectory(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    states, grid = [x], torch.linspace(1, 0, 9, dtype=x.dtype)
    for t, t_next in pairwise(grid):
        states.append(Ode().step(velocity(states[-1], t), states[-1], t, t_next).mean)
    return torch.stack(states)


def test_a_student_without_loss_samples_the_guided_teacher_at_scale_one() -> None:
    """Folding: fit the student on its own states, then compare whole trajectories."""
    x, grid = random(64, 1), torch.linspace(1, 0, 9, dtype=torch.float64)
    table: dict[float, Tensor] = {}
    for i, t in enumerate(grid[:-1].tolist()):  # the exact minimiser, state by state
        visited = trajectory(lambda s, u: table.get(float(u), s.new_zeros(())), x)[i]
        table[t] = guided_teacher(visited, grid[i])
    states = trajectory(lambda s, u: table[float(u)], x)
    times = grid[:-1].repeat_interleave(64)
    student = torch.cat([table[float(t)] for t in grid[:-1]])
    teacher = torch.cat([guided_teacher(s, t) for s, t in zip(states[:-1], grid[:-1], strict=True)])
    weight = torch.full_like(times, 1 / len(times))
    visited_points = Points(x=states[:-1].reshape(-1, 1), t=times, advantage=torch.zeros_like(times), weight=weight)
    assert VelocityMatch().loss(visited_points, {Role.CURRENT: student, Role.TEACHER: teacher}).value == 0
    assert torch.equal(states, trajectory(guided_teacher, x))


def prompt(task: str, category: str) -> Prompt:
    return Prompt(id="0", text="a red square", task=task, category=category)


def test_the_teacher_is_chosen_by_task_or_by_category() -> None:
    one = prompt("edit", "portrait")
    assert VelocityMatch().teacher(one) == "edit"
    assert VelocityMatch(VelocityMatchOptions(route="category")).teacher(one) == "portrait"


def test_routing_to_identical_teachers_is_distilling_from_one() -> None:
    matcher, where, student = VelocityMatch(), points(), random(N, D, seed=4).requires_grad_()
    shared = random(N, D, seed=5)
    teachers = {"t2i": shared, "edit": shared.clone()}
    prompts = [prompt(task, "general") for task in ("t2i", "edit", "edit", "t2i", "edit")]
    routed = torch.stack([teachers[matcher.teacher(p)][n] for n, p in enumerate(prompts)])
    many, one = (matcher.loss(where, {Role.CURRENT: student, Role.TEACHER: t}).value for t in (routed, shared))
    assert torch.equal(many, one)
    assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in (many, one)))


def test_distillation_needs_visited_states_and_no_rewards() -> None:
    assert VelocityMatch.requires.points == "trajectory"
    assert VelocityMatch.requires.rollout_role is Role.CURRENT
    assert not VelocityMatch.requires.advantage
    assert VelocityMatch().roles() == {Role.CURRENT, Role.TEACHER}
