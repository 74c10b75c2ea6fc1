"""Objectives summed with weights: one objective to everything that uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from velatura.core.components import Component, NoOptions, PolicyObjective
from velatura.core.errors import RecipeError, prefixed
from velatura.core.recipe import Ref
from velatura.core.types import Loss, Points, Requirements, Role

ROUNDS = (0, 1, 10, 100, 1000)
"""Steps at which the paces of two objectives are compared."""
Make = Callable[[str, Ref, str], Component[Any]]
"""Kind, reference, place within the stage -> the component."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One objective of a sum."""

    objective: PolicyObjective[Any]
    weight: float
    at: str
    """Its place in the recipe, for messages."""


class Summed(PolicyObjective[NoOptions]):
    """L = L_1 + sum_i w_i L_i, over the objectives of a stage.

    It needs what any of them needs. Roles are evaluated once for all of them. The metrics of the first keep their
    names; those of the others begin with `plus/<name>`, where `plus/<name>` itself is the term's own loss, unweighted.
    """

    def __init__(self, first: PolicyObjective[Any], others: Sequence[Term]) -> None:
        """
        Raises:
            RecipeError: they do not go together.
        """
        super().__init__()
        self.first, self.others = first, tuple(others)
        self.name = " + ".join([first.name, *(term.objective.name for term in others)])  # type: ignore[misc]
        self._refuse_doubles()
        self.requires = self._needs()
        self._refuse_two_paces()

    @property
    def objectives(self) -> tuple[PolicyObjective[Any], ...]:
        """All of them."""
        return (self.first, *(term.objective for term in self.others))

    def _refuse_doubles(self) -> None:
        seen = {self.first.name}
        for term in self.others:
            if term.objective.name in seen:
                raise RecipeError(prefixed(
                    term.at, f"objective '{term.objective.name}' is there already. Name it once, with both weights"
                ))  # fmt: skip
            seen.add(term.objective.name)

    def _needs(self) -> Requirements:
        """Of all of them together."""
        needs = [objective.requires for objective in self.objectives]
        decided = {own.points: objective for objective, own in zip(self.objectives, needs, strict=True)}
        decided.pop("any", None)
        if len(decided) > 1:
            forward, visited = decided["forward"].name, decided["trajectory"].name
            raise RecipeError(prefixed(self.others[-1].at, (
                f"objective '{forward}' learns from finished samples that are re-noised, '{visited}' from the states "
                f"that the sampler visited: they have no state in common to be summed at. Take two of one kind; "
                f"'velocity-kl', 'ema-kl', 'anchor' and 'norm-hinge' go with both"
            )))  # fmt: skip
        old = any(own.rollout_role is Role.OLD for own in needs)
        return Requirements(
            points=next(iter(decided), "any"),
            roles=frozenset[Role]().union(*(own.roles for own in needs)),
            rollout_role=Role.OLD if old else self.first.requires.rollout_role,
            advantage=any(own.advantage for own in needs),
            stochastic_steps=any(own.stochastic_steps for own in needs),
            contrast=all(own.contrast for own in needs),
            whole_group=any(own.whole_group for own in needs),
            shared_noise=any(own.shared_noise for own in needs),
            several_updates=all(own.several_updates for own in needs),
        )

    def _refuse_two_paces(self) -> None:
        """OLD and EMA are one weight set each, so they follow at one pace."""
        for role in (Role.OLD, Role.EMA):
            paces = {self._paces(objective, role): objective.name for objective in self._using(role)}
            if len(paces) > 1:
                one, other = list(paces.values())[:2]
                raise RecipeError(prefixed(self.others[-1].at, (
                    f"objectives '{one}' and '{other}' let the {role} policy follow the current one at different "
                    f"paces, and there is one such policy. Give both the same old_decay options, or use one of them"
                )))  # fmt: skip

    def _using(self, role: Role) -> list[PolicyObjective[Any]]:
        return [own for own in self.objectives if role in own.roles() or own.requires.rollout_role is role]

    @staticmethod
    def _paces(objective: PolicyObjective[Any], role: Role) -> tuple[float, ...]:
        decay = objective.old_decay if role is Role.OLD else objective.ema_decay
        return tuple(decay(step) for step in ROUNDS)

    def roles(self) -> frozenset[Role]:
        """Those that any of them needs."""
        return frozenset[Role]().union(*(objective.roles() for objective in self.objectives))

    def old_decay(self, step: int) -> float:
        """That of those which have an old policy."""
        return next((own.old_decay(step) for own in self._using(Role.OLD)), 0.0)

    def ema_decay(self, step: int) -> float:
        """That of those which have an average."""
        return next((own.ema_decay(step) for own in self._using(Role.EMA)), 0.0)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The weighted sum at N points; each objective sees the roles that it asks for."""
        found = self._part(self.first, points, velocity)
        value, metrics, by_time = found.value, dict(found.metrics), dict(found.by_time)
        share = points.weight.sum().clamp_min(torch.finfo(points.weight.dtype).tiny)
        for term in self.others:
            found, name = self._part(term.objective, points, velocity), f"plus/{term.objective.name}"
            value = value + term.weight * found.value
            metrics[name] = found.value.detach() / share
            metrics |= {f"{name}/{metric}": number for metric, number in found.metrics.items()}
            by_time |= {f"{name}/{metric}": numbers for metric, numbers in found.by_time.items()}
        return Loss(value=value, metrics=metrics, by_time=by_time)

    @staticmethod
    def _part(objective: PolicyObjective[Any], points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        return objective.loss(points, {role: velocity[role] for role in objective.roles()})


def objective_of(
    stage: Any, make: Make, at: Callable[[str], str] = lambda place: place, first: PolicyObjective[Any] | None = None
) -> PolicyObjective[Any]:
    """The objective of a stage that learns: what stands in its slot, and what is added to it.

    `at`: place within the stage -> place in the recipe, for messages. `first`: what stands in the slot, if it was made
    before.

    Raises:
        RecipeError: a component or its options are wrong, or they do not go together.
    """
    slot = "distiller" if stage.stage == "distill" else "objective"
    found: Any = first or make(slot, getattr(stage, slot), slot)
    terms = [
        Term(objective=make("objective", ref, f"plus.{i}"), weight=ref.weight, at=at(f"plus.{i}"))  # type: ignore[arg-type]
        for i, ref in enumerate(getattr(stage, "plus", []))
        if ref.weight > 0
    ]
    return Summed(found, terms) if terms else found
