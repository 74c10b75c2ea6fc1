"""Checks of objectives and distillers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from velatura.core.components import Kernel, NoOptions, PolicyObjective
from velatura.core.types import Loss, Points, Prompt, Requirements, Role, Transition
from velatura.testing.kit import NotChecked, Subject, check, require, require_close, require_finite
from velatura.testing.samples import make_prompts

COUNT, SHAPE = 6, (5, 4)
TIMES = (0.95, 0.8, 0.6, 0.4, 0.2, 0.1)


def _points(needs: Requirements, times: tuple[float, ...] = TIMES) -> Points:
    """States as the core hands them over: re-noised latents, or visited states."""
    draw = torch.Generator().manual_seed(6)
    x0, noise = torch.randn(2, COUNT, *SHAPE, generator=draw)
    t, first = torch.tensor(times), torch.tensor([0, 0, 0, 3, 3, 3])
    if needs.shared_noise:  # as the core re-noises a group
        t, noise = t[first], noise[first]
    share = t[:, None, None]
    common: dict[str, Any] = {
        "x": (1 - share) * x0 + share * noise,
        "t": t,
        "advantage": torch.tensor([1.5, -1.0, 0.5, -0.5, 2.0, -2.0]) if needs.advantage else torch.zeros(COUNT),
        "weight": torch.tensor([0.1, 0.2, 0.1, 0.3, 0.1, 0.2]),
        "group": torch.tensor([0, 0, 0, 1, 1, 1]),
    }
    if needs.points != "trajectory":
        return Points(**common, x0=x0, target=noise - x0)
    t_next = (t - 0.1).clamp_min(0)
    if not needs.stochastic_steps:
        return Points(**common, x_next=common["x"] + (t_next - t)[:, None, None] * (noise - x0), t_next=t_next)
    kernel = Jitter()
    step = kernel.step(noise - x0, common["x"], t[:, None, None], t_next[:, None, None])
    x_next = step.mean + step.std * torch.randn(step.mean.shape, generator=draw)
    return Points(**common, x_next=x_next, t_next=t_next, kernel=kernel, log_prob=kernel.log_prob(x_next, step))


class Jitter(Kernel[NoOptions]):
    """Euler's step and noise of constant rate beside it: the least that a ratio can be taken of."""

    name = "jitter"
    stochastic = True

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """x + v dt, with standard deviation sqrt(-dt) / 2."""
        return Transition(mean=x + (t_next - t) * v, std=(t - t_next).sqrt() / 2)


def _velocities(objective: PolicyObjective[Any], points: Points, *, equal: bool) -> dict[Role, Tensor]:
    """One tensor [N ...] for each role, all with gradient, so that a leak is seen; equal ones, or near ones."""
    draw = torch.Generator().manual_seed(7)
    base = torch.randn(points.x.shape, generator=draw)
    found = {}
    for role in sorted(objective.roles()):
        other = base if equal else base + 0.1 * torch.randn(base.shape, generator=draw)
        found[role] = other.clone().requires_grad_()
    return found


def _rows(points: Points, n: int, size: int) -> Points:
    names = ("x", "t", "advantage", "weight", "x0", "target", "x_next", "t_next", "log_prob", "group")
    row: dict[str, Any] = {}
    for name in names:
        value = getattr(points, name)
        row[name] = None if value is None else value[n : n + size]
    return Points(**row, kernel=points.kernel)


def _lost(objective: PolicyObjective[Any], points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
    loss = objective.loss(points, velocity)
    require(isinstance(loss, Loss), f"`loss` returned a {type(loss).__name__} instead of Loss")
    require(loss.value.ndim == 0, f"the loss has shape {list(loss.value.shape)} instead of being a scalar")
    return loss


def _gradient(loss: Loss, velocity: Tensor) -> Tensor:
    """dL/dv [N ...] of one velocity; 0 where the loss does not depend on it."""
    if not loss.value.requires_grad:
        return torch.zeros_like(velocity)
    (gradient,) = torch.autograd.grad(loss.value, velocity, allow_unused=True, retain_graph=True)
    return torch.zeros_like(velocity) if gradient is None else gradient


@check("objective")
@check("distiller")
def roles_are_among_those_it_requires(subject: Subject) -> None:
    """CURRENT is one of them; OLD is remembered by a share in [0, 1)."""
    objective = subject.ready()
    roles, needed = objective.roles(), objective.requires.roles
    require(Role.CURRENT in roles, f"`roles` are {_listed(roles)} without {Role.CURRENT}")
    require(roles <= needed, f"`roles` names {_listed(roles - needed)}, which `requires.roles` does not")
    decays = [objective.old_decay(step) for step in (0, 1, 10, 10_000)]
    require(
        all(0 <= d < 1 for d in decays), f"`old_decay` gives {decays}; the old policy survives by a share in [0, 1)"
    )


def _listed(roles: frozenset[Role]) -> str:
    return ", ".join(sorted(roles)) or "none"


@check("objective")
@check("distiller")
def only_the_current_policy_gets_a_gradient(subject: Subject) -> None:
    """Old, reference and teacher are what it is compared with; metrics carry no gradient at all."""
    objective = subject.ready()
    points = _points(objective.requires)
    velocity = _velocities(objective, points, equal=False)
    loss = _lost(objective, points, velocity)
    require(bool(_gradient(loss, velocity[Role.CURRENT]).any()), f"{Role.CURRENT} gets no gradient")
    for role, value in velocity.items():
        if role is not Role.CURRENT:
            require(not bool(_gradient(loss, value).any()), f"{role} gets a gradient; use `.detach()`")
    wrong = [name for name, metric in loss.metrics.items() if torch.as_tensor(metric).requires_grad]
    require(not wrong, f"metric {wrong[0] if wrong else ''} carries a gradient; use `.detach()`")


@check("objective")
@check("distiller")
def losses_of_micro_batches_add_up(subject: Subject) -> None:
    """The loss of N points is the sum of the losses of each, or of each group, where the objective compares whole ones:
    micro-batches and ranks must not change a step."""
    objective = subject.ready()
    points = _points(objective.requires)
    velocity = _velocities(objective, points, equal=False)
    whole = _lost(objective, points, velocity).value
    size = COUNT // 2 if objective.requires.whole_group else 1
    parts = [
        _lost(objective, _rows(points, n, size), {role: v[n : n + size] for role, v in velocity.items()}).value
        for n in range(0, COUNT, size)
    ]
    what = "groups" if objective.requires.whole_group else "points"
    require_close(torch.stack(parts).sum(), whole, f"the losses of single {what} do not sum to that of all of them")


@check("objective")
@check("distiller")
def loss_is_proportional_to_the_weights(subject: Subject) -> None:
    """`points.weight` is the share of a point in the batch."""
    objective = subject.ready()
    points = _points(objective.requires)
    velocity = _velocities(objective, points, equal=False)
    once = _lost(objective, points, velocity).value
    twice = _lost(objective, replace(points, weight=2 * points.weight), velocity).value
    require_close(twice, 2 * once, "twice the weights are not twice the loss: weigh every point by `points.weight`")


@check("objective")
@check("distiller")
def loss_is_finite_at_both_ends_of_time(subject: Subject) -> None:
    """At t = 1 and as t goes to 0, with its gradient."""
    objective = subject.ready()
    for ends in ((1.0,) * COUNT, (1e-3,) * COUNT):
        points = _points(objective.requires, ends)
        for equal in (True, False):
            velocity = _velocities(objective, points, equal=equal)
            loss = _lost(objective, points, velocity)
            require_finite(loss.value, f"the loss at t = {ends[0]:g}")
            require_finite(_gradient(loss, velocity[Role.CURRENT]), f"the gradient at t = {ends[0]:g}")


@check("objective")
def zero_advantage_gives_no_gradient(subject: Subject) -> None:
    """Before the first update, samples that are as good as their group move nothing; a run is refused otherwise."""
    objective = _with_advantage(subject)
    points = replace(_points(objective.requires), advantage=torch.zeros(COUNT))
    velocity = _velocities(objective, points, equal=True)
    norm = float(_gradient(_lost(objective, points, velocity), velocity[Role.CURRENT]).norm())
    require(norm == 0, f"with all velocities equal, zero advantage gives a gradient of norm {norm:.2e}")


@check("objective")
def better_samples_attract_and_worse_ones_repel(subject: Subject) -> None:
    """On-policy, a positive advantage pulls the velocity towards that of its sample, a negative one pushes it away."""
    objective = _with_advantage(subject)
    if objective.requires.points == "trajectory":
        raise NotChecked("its points are visited states, of which this check knows no target")
    points = _points(objective.requires)
    velocity = _velocities(objective, points, equal=True)
    gradient = _gradient(_lost(objective, points, velocity), velocity[Role.CURRENT])
    assert points.target is not None
    along = (gradient * (velocity[Role.CURRENT] - points.target)).flatten(1).sum(1).detach()
    for n in range(COUNT):
        advantage = float(points.advantage[n])
        moved = "towards" if float(along[n]) > 0 else "away from"
        require(float(along[n]) * advantage > 0, f"a sample of advantage {advantage:g} is moved {moved} its target")


def _with_advantage(subject: Subject) -> PolicyObjective[Any]:
    objective: PolicyObjective[Any] = subject.ready()
    if not objective.requires.advantage:
        raise NotChecked("it needs no advantages")
    if not objective.requires.contrast:
        raise NotChecked("it learns from every sample, from better ones more")
    return objective


@check("distiller")
def a_student_like_its_teacher_has_nothing_to_learn(subject: Subject) -> None:
    """Loss and gradient are 0 where the velocities agree."""
    objective = subject.ready()
    points = _points(objective.requires)
    velocity = _velocities(objective, points, equal=True)
    loss = _lost(objective, points, velocity)
    require_close(
        loss.value.detach(), torch.tensor(0.0), "the loss of a student that equals its teacher is not 0", 1e-6
    )
    require(
        not bool(_gradient(loss, velocity[Role.CURRENT]).any()), "a student that equals its teacher gets a gradient"
    )


@check("distiller")
def every_prompt_has_one_teacher(subject: Subject) -> None:
    """The same name each time, for prompts of any task and category."""
    distiller = subject.ready()
    prompts: list[Prompt] = [*make_prompts(4), *make_prompts(4, task="edit")]
    for prompt in prompts:
        name = distiller.teacher(prompt)
        require(isinstance(name, str) and name, f"the teacher of prompt {prompt.id} is {name!r} instead of a name")
        require(distiller.teacher(prompt) == name, f"prompt {prompt.id} has another teacher the second time")
