"""What an adapter knows of its memory without reading a weight, and what forwards and backwards of it would need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from velatura.core.components import GuidancePolicy, ModelAdapter, PolicyObjective
from velatura.core.encoding import Encoder
from velatura.core.ghost import Ghost, Live
from velatura.core.learner import Learner, Tally
from velatura.core.points import MicroBatch
from velatura.core.policy import Policy
from velatura.core.rollout import guided_velocity
from velatura.core.types import Conditioning, Points, Prompt, Role

TEACHER = "teacher"
SMALL = 2_000_000
"""Parameters up to which a network is run with numbers, on samples that are small, too."""
SHORT = 4096
"""Numbers in a sample that is small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """A network without weights, what it is told of one prompt, and how large everything beside it is."""

    net: nn.Module
    """What `load` returns, on the meta device: the same types, the same parameters trained."""
    cond: Callable[[int], Conditioning]
    """So many prompts like the one asked about, as `encode` returns them; numbers do not matter."""
    null: Callable[[int], Conditioning]
    """The same of `null`."""
    frozen: Mapping[str, int]
    """Bytes of parts that are on the device only while they are used, like the text encoders."""
    vae: nn.Module | None = None
    """On the meta device, where `decode` below uses it."""
    decode: Callable[[Tensor], Tensor] | None = None
    """Latents [B ...] to images with `vae`; None where decoding needs next to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What goes through the network together."""

    points: int
    """Samples or state points N."""
    prompts: int
    """Distinct prompts that they belong to."""
    limit: int
    """Most rows in one forward of a guided velocity."""


class Rehearsal:
    """One network that goes through the motions of training and sampling without numbers."""

    def __init__(
        self, adapter: ModelAdapter[Any], footprint: Footprint, prompt: Prompt, dtype: torch.dtype,
        solid: bool | None = None,
    ) -> None:  # fmt: skip
        """`dtype` is the engine's precision; `solid` runs with numbers, as small networks do on small samples unless it
        is False."""
        self.adapter, self.footprint, self.prompt = adapter, footprint, prompt
        self.trained = {name: p.numel() for name, p in footprint.net.named_parameters() if p.requires_grad}
        self.loaded = sum(p.numel() * p.element_size() for p in footprint.net.parameters() if p.requires_grad)
        self.shape = tuple(adapter.noise([prompt], [0]).shape[1:])
        small = sum(p.numel() for p in footprint.net.parameters()) < SMALL and math.prod(self.shape) <= SHORT
        self.ghost = Ghost(footprint.net, dtype, solid=small if solid is None else solid)
        self.weights = sum(t.numel() * t.element_size() for t in (*self.net.parameters(), *self.net.buffers()))

    @property
    def net(self) -> nn.Module:
        """The network, whole."""
        return self.ghost.net

    def told(self, prompts: int, *, guided: bool) -> int:
        """Bytes of the conditionings of so many prompts, and of the null condition where it is needed."""
        with Live() as live:
            kept = [self.footprint.cond(prompts), *([self.footprint.null(1)] if guided else [])]
            return live.now if kept else 0

    def rollout(self, batch: Batch, guidance: GuidancePolicy[Any], role: Role) -> int:
        """Most bytes in a forward without gradient as `role` is guided, the prompts' prepared parts included."""

        def run(live: Live) -> int:
            told, null = _Told(self.footprint), None
            cond = told.cond([self.prompt] * batch.prompts)
            rows, t = _rows(batch), torch.full((batch.points,), 0.5)
            if bool((guidance.scale(role, t) != 1).any()):
                null = told.null([self.prompt] * batch.prompts)
            began = live.begin()
            with torch.no_grad():
                ready = self.adapter.prepare(self.net, cond)
                blank = self.adapter.prepare(self.net, null) if null is not None else None
                x = self.ghost.tensor(batch.points, *self.shape)
                v, _ = guided_velocity(
                    self.net, self.adapter, guidance, x, t, ready, blank, rows, role=role, limit=batch.limit
                )
                x = x + 0.1 * v
            return began

        return self.ghost.most(run)

    def update(self, batch: Batch, guidance: GuidancePolicy[Any], objective: PolicyObjective[Any]) -> int:
        """Most bytes in the forward and the backward of one micro-batch, the velocities of other roles at hand; kept
        gradients are not counted."""

        def run(live: Live) -> int:
            told = _Told(self.footprint)
            learner = Learner(
                engine=cast("Any", SimpleNamespace(module=self.net)), policy=Policy(self.net), adapter=self.adapter,
                guidance=guidance, objective=objective, encoder=cast("Encoder", told),
            )  # fmt: skip
            told.cond([self.prompt] * batch.prompts)
            with _gradients_taken(self.net):
                began = live.begin()
                frozen = {role: self.ghost.tensor(batch.points, *self.shape) for role in objective.roles()}
                frozen.pop(Role.CURRENT)
                velocity = learner.velocities(self._micro_batch(batch), Tally(), frozen)
                current = velocity[Role.CURRENT]
                others = [v for role, v in velocity.items() if role is not Role.CURRENT]
                loss = sum(((current - other).square().mean() for other in others), current.square().mean())
                del velocity, current, others
                cast("Any", loss).backward()
            return began

        return self.ghost.most(run)

    def decode(self, samples: int, dtype: torch.dtype) -> int | None:
        """Most bytes while so many samples become pictures; None where it is not known."""
        decode, vae = self.footprint.decode, self.footprint.vae
        if decode is None or vae is None:
            return None if self.footprint.frozen else 0
        if any(p.device.type == "meta" for p in vae.parameters()):
            self.ghost.adopt(vae, dtype)
        with Live() as live, torch.no_grad():
            live.ignore(vae.parameters())
            live.ignore(vae.buffers())
            x = self.ghost.tensor(samples, *self.shape)
            began = live.begin()
            decode(x)
            most: int = live.peak - began
            return most

    def _micro_batch(self, batch: Batch) -> MicroBatch:
        even, t = torch.zeros(batch.points), torch.full((batch.points,), 0.5)
        x, x0, target = (self.ghost.tensor(batch.points, *self.shape) for _ in range(3))
        points = Points(x=x, t=t, advantage=even, weight=even, x0=x0, target=target)
        return MicroBatch(
            prompts=(self.prompt,) * batch.prompts, rows=_rows(batch), points=points, teacher=TEACHER
        )  # fmt: skip


class _Told:
    """An encoder whose prompts are all alike."""

    def __init__(self, footprint: Footprint) -> None:
        self._footprint = footprint
        self._kept: dict[tuple[str, int], Conditioning] = {}

    def cond(self, prompts: Any) -> Conditioning:
        return self._once("cond", len(prompts))

    def null(self, prompts: Any) -> Conditioning:
        return self._once("null", len(prompts))

    def _once(self, branch: str, count: int) -> Conditioning:
        if (branch, count) not in self._kept:
            self._kept[branch, count] = getattr(self._footprint, branch)(count)
        return self._kept[branch, count]


def _rows(batch: Batch) -> Tensor:
    """[N] the prompt of each point, as even as can be."""
    return torch.arange(batch.points) * batch.prompts // batch.points


@contextmanager
def _gradients_taken(net: nn.Module) -> Iterator[None]:
    """Each gradient is gone as soon as it is complete, as if an engine had added it to what it keeps."""

    def take(weight: Tensor) -> None:
        weight.grad = None

    trained = [p for p in net.parameters() if p.requires_grad]
    handles = [cast("Any", p).register_post_accumulate_grad_hook(take) for p in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
