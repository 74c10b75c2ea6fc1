"""State points and velocities by role to one optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from velatura.core.components import GuidancePolicy, ModelAdapter, PolicyObjective
from velatura.core.encoding import Encoder
from velatura.core.engine.protocol import Engine
from velatura.core.guard import Fault, Guard, fault_of
from velatura.core.points import MicroBatch, idle
from velatura.core.policy import CURRENT, Policy
from velatura.core.pulse import alive
from velatura.core.rollout import guided_velocity
from velatura.core.types import Conditioning, Points, Role

if TYPE_CHECKING:
    from velatura.core.kept_batches import Keepable

SET_OF = {
    Role.CURRENT: CURRENT, Role.OLD: "old", Role.REFERENCE: "reference", Role.EMA: "ema", Role.ANCHOR: "anchor"
}  # fmt: skip
"""Role -> name of its weight set. Teachers are sets of their own: `teacher/<name>`."""

FOLLOWING = (Role.OLD, Role.EMA)
"""Roles whose weight sets follow the current one, after every round."""
FROZEN = (Role.OLD, Role.EMA, Role.REFERENCE, Role.ANCHOR, Role.TEACHER)
"""Roles without gradient."""
QUARTERS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")
"""Names of the parts of time for which metrics are reported; the upper end of each is part of it."""

Frozen = Mapping[Role, Tensor | None]
"""Velocities [N ...] of the roles without gradient; None where it is the current one."""
Identity = tuple[int, tuple[float, ...]]
"""Version of a weight set, and guidance scales."""


def sets_for(objective: PolicyObjective) -> frozenset[str]:  # type: ignore[type-arg]
    """The weight sets that an objective needs beside the current weights and its teachers: for its loss or rollouts."""
    roles = objective.roles() | {objective.requires.rollout_role}
    return frozenset(SET_OF[role] for role in roles & {*FOLLOWING, Role.REFERENCE})


@dataclass(slots=True)
class Tally:
    """What one optimiser step cost and measured."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Weighted sums over micro-batches."""
    forward_rows: int = 0
    """Transformer rows without gradient."""
    gradient_rows: int = 0
    """Transformer rows with forward and backward."""
    faults: list[Fault] = field(default_factory=list)
    """What is not finite in it."""
    timed: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Metrics by quarter of the time: sums over points, weighted, and the weights' sum."""

    @property
    def reported(self) -> dict[str, float]:
        """All metrics; those by time as weighted means."""
        means = {name: total / weight for name, (total, weight) in self.timed.items() if weight > 0}
        return self.metrics | means

    def observe(self, name: str, values: Tensor, points: Points) -> None:
        """Sum `values` [N] into the metrics of the quarters that `points` are in."""
        quarter = (points.t.double() * len(QUARTERS)).ceil().long().clamp(1, len(QUARTERS)) - 1
        weight = points.weight.double()
        for q in sorted(set(quarter.tolist())):
            own = quarter == q
            total = float((weight[own] * values.detach().double()[own]).sum())
            self._gather(f"{name}/{QUARTERS[q]}", total, float(weight[own].sum()))

    def _gather(self, name: str, total: float, weight: float) -> None:
        before = self.timed.get(name, (0.0, 0.0))
        self.timed[name] = (before[0] + total, before[1] + weight)

    def add(self, name: str, value: float) -> None:
        """Sum `value` into a metric."""
        self.metrics[name] = self.metrics.get(name, 0.0) + value

    def include(self, other: Tally, share: float) -> None:
        """Add another step's rows, and `share` of its metrics."""
        for name, value in other.metrics.items():
            self.add(name, value * share)
        for name, (total, weight) in other.timed.items():
            self._gather(name, total * share, weight * share)
        self.forward_rows += other.forward_rows
        self.gradient_rows += other.gradient_rows
        self.faults += other.faults

    @classmethod
    def of_updates(cls, updates: Sequence[Tally]) -> Tally:
        """Rows of all updates, metrics as means over those that were taken, and `updated`, their share."""
        total = cls()
        taken = [update for update in updates if not update.faults]
        for update in updates:
            total.include(
                update if not update.faults else replace(update, metrics={}, timed={}), 1 / max(1, len(taken))
            )
        if updates:
            total.metrics["updated"] = len(taken) / len(updates)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """Everything needed to turn micro-batches into an optimiser step."""

    engine: Engine
    policy: Policy
    adapter: ModelAdapter  # type: ignore[type-arg]
    guidance: GuidancePolicy  # type: ignore[type-arg]
    objective: PolicyObjective  # type: ignore[type-arg]
    encoder: Encoder
    guard: Guard | None = None
    """Counts and keeps the updates that are not taken; None only skips them."""

    def learn(self, batches: Sequence[MicroBatch]) -> Tally:
        """Accumulate the gradients of all micro-batches, then step once; not where a loss or the gradient of any rank
        is not finite: then no rank moves anything, and the tally says why.

        Every other weight set comes to the device once and answers for all of them before the first gradient is taken.
        """
        if self.guard is not None:
            self.guard.next_update()
        tally = Tally()
        frozen = self.accumulate_all(batches, tally)
        tally = self._of_all_ranks(tally)
        if tally.faults:
            self.engine.zero_grad()
        else:
            info = self.engine.step()
            if not info.updated:
                tally.faults.append(Fault(self.engine.rank, None, "the gradient is not finite"))
        if tally.faults:
            if self.guard is not None:
                self.guard.refuse(tally.faults, _to_keep(batches, frozen))
            return replace(tally, metrics={"updated": 0.0}, timed={})
        self.policy.changed()
        tally.metrics |= {"grad_norm": info.grad_norm, "lr": info.lr, "updated": 1.0}
        return tally

    def accumulate_all(self, batches: Sequence[MicroBatch], tally: Tally) -> list[Frozen]:
        """Forwards and backwards of one optimiser step, up to its last; as many micro-batches on every rank. Returns
        the velocities of the roles without gradient."""
        last = len(batches) - 1
        known = self.frozen(batches, tally)
        with self._fetched(batches):
            for i, (batch, frozen) in enumerate(zip(batches, known, strict=True)):
                loss = self.accumulate(batch, tally, last=i == last, frozen=frozen)
                if (fault := fault_of(self.engine.rank, i, batch, loss)) is not None:
                    tally.faults.append(fault)
        return known

    def even(self, batches: Sequence[MicroBatch], spare: Callable[[], MicroBatch]) -> list[MicroBatch]:
        """As many micro-batches as the rank that has most: DeepSpeed waits for every rank in every backward.

        What is added weighs nothing; `spare` makes one where there is none. Collective.
        """
        most = max(self.engine.gather_object(len(batches)))
        missing = most - len(batches)
        return [*batches, *([idle(batches[0] if batches else spare())] * missing if missing else ())]

    def _fetched(self, batches: Sequence[MicroBatch]) -> AbstractContextManager[None]:
        """Sharded weights come layer by layer while all ranks do the same. Where these do not, one with an edit and one
        without, or one under guidance, each has all weights meanwhile. Collective."""
        if not self.engine.shards_weights or self.engine.world_size == 1:
            return nullcontext()
        own = [
            (len(batch.prompts[0].sources), bool((self._scale(Role.CURRENT, batch) != 1).any())) for batch in batches
        ]
        kinds = self.engine.gather_object(own)
        return nullcontext() if all(kind == kinds[0] for kind in kinds) else self.engine.whole()

    def _scale(self, role: Role, batch: MicroBatch) -> Tensor:
        return self.guidance.scale(role, batch.points.t)

    def _of_all_ranks(self, mine: Tally) -> Tally:
        """Sums over ranks: weights of points are shares of the whole step."""
        if self.engine.world_size == 1:
            return mine
        total = Tally()
        for tally in self.engine.gather_object(mine):
            total.include(tally, 1.0)
        return total

    def accumulate(self, batch: MicroBatch, tally: Tally, *, last: bool, frozen: Frozen | None = None) -> float:
        """Forward and backward of one micro-batch, whose loss is returned; metrics are weighted by its share of the
        points."""
        velocity = self.velocities(batch, tally, frozen)
        loss = self.objective.loss(batch.points, velocity)
        alive("the backward of an update")
        self.engine.backward(loss.value, last=last)
        found = float(loss.value.detach())
        tally.add("loss", found)
        share = float(batch.points.weight.sum())
        for name, value in loss.metrics.items():
            tally.add(name, float(value) * share)
        for name, values in loss.by_time.items():
            tally.observe(name, values, batch.points)

        return found

    def follow(self, step: int) -> None:
        """After round `step`: the weight sets that follow the current one, each at its own pace."""
        for role, decay in ((Role.OLD, self.objective.old_decay), (Role.EMA, self.objective.ema_decay)):
            if SET_OF[role] in self.policy.sets:
                self.policy.follow(SET_OF[role], decay(step))

    def velocities(self, batch: MicroBatch, tally: Tally, frozen: Frozen | None = None) -> dict[Role, Tensor]:
        """[N ...] per role, of which only CURRENT has a gradient; the others are `frozen`, where they are known."""
        if frozen is None:
            (frozen,) = self.frozen([batch], tally)
        cond = self.encoder.cond(batch.prompts)
        current, rows = self._velocity(self.engine.module, batch, cond, Role.CURRENT)
        tally.gradient_rows += rows
        same = current.detach()
        return {role: same if found is None else found for role, found in frozen.items()} | {Role.CURRENT: current}

    def frozen(self, batches: Sequence[MicroBatch], tally: Tally) -> list[Frozen]:
        """The velocities of the roles without gradient, for each micro-batch; None where a role's is the current one.

        Weight set by weight set, each brought once; equal weights under equal guidance are evaluated once.
        """
        needed = self.objective.roles()
        roles: list[Role] = [role for role in FROZEN if role in needed]
        asked = [{role: self._identity(role, self._set(role, batch), batch) for role in roles} for batch in batches]
        known: list[dict[Identity, Tensor | None]] = [
            {self._identity(Role.CURRENT, CURRENT, batch): None} for batch in batches
        ]
        jobs: dict[str, list[tuple[int, Role]]] = {}
        for i, batch in enumerate(batches):
            for role, identity in asked[i].items():
                if identity not in known[i]:
                    known[i][identity] = None  # until its set is worn
                    jobs.setdefault(self._set(role, batch), []).append((i, role))
        with self.engine.whole() if roles else nullcontext():
            for name, own in jobs.items():
                with self.policy.on_device(name, self.engine.device), self.policy.wearing(name) as net:
                    for i, whose in own:
                        cond = self.encoder.cond(batches[i].prompts)
                        known[i][asked[i][whose]], rows = self._velocity(net, batches[i], cond, whose)
                        tally.forward_rows += rows
        return [{role: known[i][asked[i][role]] for role in roles} for i in range(len(batches))]

    def _set(self, role: Role, batch: MicroBatch) -> str:
        """The weight set that a role wears."""
        name = batch.teacher if role is Role.TEACHER else SET_OF[role]
        if name is None:
            raise ValueError("an objective asked for a teacher, but the stage has none")
        return name

    def current_velocity(self, batch: MicroBatch, name: str = CURRENT) -> Tensor:
        """[N ...] of the weight set `name` under the guidance of CURRENT, without gradient."""
        with self.policy.wearing(name) as net:
            return self._velocity(net, batch, self.encoder.cond(batch.prompts), Role.CURRENT)[0]

    def teacher_velocity(self, batch: MicroBatch) -> Tensor:
        """[N ...] of the batch's teacher alone, under its guidance."""
        if batch.teacher is None:
            raise ValueError("this micro-batch has no teacher")
        with self.policy.wearing(batch.teacher) as net:
            return self._velocity(net, batch, self.encoder.cond(batch.prompts), Role.TEACHER)[0]

    def _identity(self, role: Role, name: str, batch: MicroBatch) -> Identity:
        """Equal for two roles exactly when their velocities at these points must be equal."""
        return self.policy.version(name), tuple(self._scale(role, batch).tolist())

    def _velocity(self, net: nn.Module, batch: MicroBatch, cond: Conditioning, role: Role) -> tuple[Tensor, int]:
        alive(f"a forward of role {role.value}")
        points, scale = batch.points, self._scale(role, batch)
        null = None
        if bool((scale != 1).any()):
            null = self.adapter.prepare(net, self.encoder.null(batch.prompts))
        return guided_velocity(
            net, self.adapter, self.guidance, points.x, points.t, self.adapter.prepare(net, cond), null, batch.rows,
            role=role, limit=2 * len(points.x),
        )  # fmt: skip


def _to_keep(batches: Sequence[MicroBatch], frozen: Sequence[Frozen]) -> list[Keepable]:
    from velatura.core.kept_batches import Kept

    pairs = zip(batches, frozen, strict=True)
    return [Kept(number=i, batch=batch, frozen=known) for i, (batch, known) in enumerate(pairs)]


def with_zero_advantage(batch: MicroBatch) -> MicroBatch:
    """The same points, every sample exactly as good as its group."""
    return replace(batch, points=replace(batch.points, advantage=torch.zeros_like(batch.points.advantage)))
