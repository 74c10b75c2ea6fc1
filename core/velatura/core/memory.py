"""What a stage keeps where, and the most memory that one of its GPUs needs at once.

Weights and what the optimiser keeps are counted; forwards and backwards are rehearsed on tensors without numbers
(`velatura.core.ghost`). What reward models keep is theirs and not counted, nor is what CUDA takes for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from velatura.core.engine.muon import block_matrices
from velatura.core.points import Group, pieces
from velatura.core.settings import Engine
from velatura.core.types import Prompt

FP32 = 4
"""Bytes of a number in fp32, which masters, gradients, moments and weight sets have."""
BUCKET = 500_000_000
"""Numbers in a bucket of gradients that DeepSpeed's processes exchange, at most."""
PHASES = ("encode", "rollout", "decode", "others", "update", "step")
"""Of a round: prompts, samples, pictures, forwards of other roles, forwards and backwards, the optimiser's step."""
GATHERED = ("encode", "rollout", "decode", "others")
"""When ZeRO 3 has all weights on every GPU; updates fetch block by block."""
GPU, CPU, USED = "GPU", "CPU", "GPU while used"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something that takes memory."""

    name: str
    size: int | None
    """Bytes per process; None where it is not known."""
    where: str = GPU
    phases: tuple[str, ...] = PHASES
    """When it is on the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """All parts of one stage."""

    parts: tuple[Part, ...]
    """Those of size 0 are left out."""
    world_size: int = 1
    """GPUs that the stage is spread over."""

    @classmethod
    def of(cls, parts: Iterable[Part], world_size: int = 1) -> MemoryPlan:
        """A plan of the parts that there are."""
        return cls(parts=tuple(part for part in parts if part.size != 0), world_size=world_size)

    def during(self, phase: str) -> int:
        """Bytes on one GPU in a phase, without what is not known."""
        return sum(part.size or 0 for part in self.parts if part.where != CPU and phase in part.phases)

    @property
    def phase(self) -> str:
        """When most is needed."""
        return max(PHASES, key=self.during)

    @property
    def peak(self) -> int:
        """The most bytes on one GPU."""
        return self.during(self.phase)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Parts whose size is not known: the peak is higher by them."""
        return tuple(part.name for part in self.parts if part.size is None)

    def part(self, name: str) -> Part:
        """The part of this name; of size 0 where there is none."""
        return next((part for part in self.parts if part.name == name), Part(name=name, size=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How an engine spreads what it trains: ZeRO divides moments and masters at stage 1, gradients too at 2, weights
    too at 3."""

    kind: str = "local"
    """`local` or `deepspeed`."""
    zero_stage: int = 0
    world_size: int = 1
    precision: str = "fp32"
    offload_optimizer: bool = False
    offload_weights: bool = False

    @classmethod
    def of(cls, engine: Engine, world_size: int = 1) -> Sharding:
        """That of a recipe's engine."""
        stage = engine.zero_stage if engine.kind == "deepspeed" else 0
        return cls(
            kind=engine.kind, zero_stage=stage, world_size=world_size, precision=engine.precision,
            offload_optimizer=engine.offload_optimizer, offload_weights=engine.offload_weights,
        )  # fmt: skip

    def share(self, size: int, stage: int) -> int:
        """Of `size` bytes what one process has, of something that is divided from ZeRO `stage` on."""
        return -(-size // self.world_size) if self.zero_stage >= stage else size

    def masters(self, trained: int) -> int:
        """Bytes of fp32 copies: of a bf16 network, and behind ZeRO of any."""
        return self.share(FP32 * trained, 1) if self.zero_stage or self.precision != "fp32" else 0

    def gradients(self, trained: int) -> int:
        """Bytes that have come together when the last backward ends."""
        return self.share(FP32 * trained, 2)

    def bucket(self, trained: int) -> int:
        """Bytes of gradients on their way between processes."""
        itemsize = FP32 if self.precision == "fp32" or self.zero_stage < 2 else 2
        return itemsize * min(trained, BUCKET) if self.zero_stage else 0


def engine_parts(net: nn.Module, weights: int, sharding: Sharding, optimizer: str) -> list[Part]:
    """Weights, masters, gradients and moments of `net`, whose trained parameters require a gradient; `weights` bytes
    in the engine's precision."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    trained = sum(p.numel() for p in named.values())
    matrices = sum(p.numel() for p in block_matrices(net, named).values()) if optimizer == "muon" else 0
    flat = sharding.share(FP32 * trained, 1) if sharding.zero_stage else 0
    kept = sharding.zero_stage == 1 and sharding.precision == "bf16"  # DeepSpeed's optimiser for it never frees them
    layers = [sum(p.numel() for p in part.parameters()) for part in net.modules() if isinstance(part, nn.ModuleList)
              for part in part]  # fmt: skip
    each = weights // max(1, sum(p.numel() for p in net.parameters()))
    dealt = sharding.zero_stage == 3
    away = CPU if sharding.offload_optimizer else GPU
    used = CPU if sharding.offload_optimizer else USED
    return [
        Part(name="transformer weights", size=sharding.share(weights, 3),
             where=CPU if sharding.offload_weights else GPU),
        Part(name="all weights, gathered from all GPUs", size=weights if dealt else 0, where=USED, phases=GATHERED),
        Part(name="a block gathered from all GPUs, and the next", size=2 * each * max(layers, default=0) * dealt,
             where=USED, phases=("update",)),
        Part(name="masters in fp32", size=sharding.masters(trained), where=away),
        Part(name=f"moments of {optimizer}", size=sharding.share(FP32 * (2 * trained - matrices), 1), where=away),
        Part(name="gradients", size=sharding.gradients(trained), where=GPU if kept else used,
             phases=PHASES if kept else ("update", "step")),
        Part(name="gradients on their way", size=sharding.bucket(trained), where=USED,
             phases=("update", "step") if sharding.zero_stage > 1 else ("step",)),
        Part(name="gradients of the own share, once more", size=flat, where=used, phases=("step",)),
    ]  # fmt: skip


def set_parts(
    trained: int, loaded: int, kept: Mapping[str, bool], teachers: Sequence[str], *, whole: bool, worn: bool = False
) -> list[Part]:
    """Weight sets of `trained` numbers: of the `kept` ones, those that follow the policy (True) in fp32; others, like
    teachers, of `loaded` bytes in the network's precision. Teachers wait on the CPU, and all sets do where the network
    is trained as a whole; one at a time is brought over, and so is one that is not kept (`worn`)."""
    parts = [
        Part(name=f"weights of role {name}", size=FP32 * trained if follows else loaded, where=CPU if whole else GPU)
        for name, follows in kept.items()
    ]
    parts += [Part(name=f"teacher {name}", size=loaded, where=CPU) for name in teachers]
    parts.append(Part(name="weights at the start", size=loaded, where=CPU))
    if teachers or kept or worn:
        parts.append(Part(name="the weights that are worn", size=loaded, where=USED, phases=("rollout", "others")))
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What a rollout takes together."""

    points: int
    """Samples."""
    prompts: int


def chunk(prompts: int, group: int, batch: int, *, guided: bool) -> Chunk:
    """Of `prompts` prompts with `group` samples each, at most `batch` transformer rows, but at least one group."""
    together = min(prompts, max(1, batch // (2 * group if guided else group)))
    return Chunk(points=together * group, prompts=together)


def micro_batch(prompt: Prompt, prompts: int, group: int, points: int, limit: int) -> Chunk:
    """The largest micro-batch of `prompts` groups of `group` samples, `points` state points each: a sample's points
    stay together, so that there may be more than `limit`."""
    every = tuple(range(group))
    groups = [Group(prompt=prompt, samples=every, numbers=every)] * prompts
    sizes = [(sum(len(g.samples) for g in piece) * points, len(piece)) for piece in pieces(groups, points, limit)]
    most = max(sizes)
    return Chunk(points=most[0], prompts=most[1])


def dtype_of(precision: str) -> torch.dtype:
    """Of an engine's `precision`."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def larger(first: MemoryPlan, second: MemoryPlan) -> MemoryPlan:
    """Of two kinds of prompts, which come one after the other, each part as large as it gets."""
    sizes = {part.name: part for part in second.parts}
    parts = [_larger(part, sizes.pop(part.name, part)) for part in first.parts]
    return replace(first, parts=(*parts, *sizes.values()))


def _larger(first: Part, second: Part) -> Part:
    if first.size is None or second.size is None:
        return replace(first, size=None)
    return replace(first, size=max(first.size, second.size))
