"""What the loop may ask of whatever moves the weights, and the options it is made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, clipping by the global norm, and a learning rate schedule; the same in every engine."""

    lr: float
    """The highest learning rate of the schedule."""
    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: matrices inside the network's blocks get orthogonalised updates, everything else AdamW."""
    matrix_lr: float = 0.02
    """The highest rate of Muon's matrices; it follows the schedule of `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled, applied to every trained parameter."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it. None: never."""
    warmup: int = 0
    """Updates over which the rate rises linearly; the first update already has lr / warmup."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up, down to 0 at `total` unless constant."""
    total: int | None = None
    """Updates of the whole run; needed by `linear` and `cosine`."""

    def __post_init__(self) -> None:
        """A schedule that ends needs to know when."""
        if self.schedule != "constant" and (self.total is None or self.total <= self.warmup):
            raise ValueError(f"schedule {self.schedule!r} needs total > warmup, got {self.total} and {self.warmup}")

    def rate(self, updates: int) -> float:
        """The learning rate of the update that comes after `updates` of them."""
        if updates < self.warmup:
            return self.lr * (updates + 1) / self.warmup
        if self.schedule == "constant" or self.total is None:
            return self.lr
        done = min((updates - self.warmup) / (self.total - self.warmup), 1.0)
        return self.lr * (1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Which engine, and how it spreads the work."""

    kind: Literal["deepspeed", "local"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: 1 optimiser state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Masters and moments live on the CPU, which also takes the step; from stage 2 on."""
    offload_weights: bool = False
    """Shards of the weights live on the CPU; stage 3 only."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights in the forward pass; with bf16 the optimiser keeps an fp32 master copy."""
    threads: int | None = None
    """CPU threads of this process; None leaves torch's choice."""
    device: str = "auto"
    """`auto` is CUDA where there is one, else the CPU."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """Merged over the DeepSpeed configuration, for what is not modelled here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """What one optimiser step did."""

    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """The rate of this update."""
    updated: bool
    """False where the norm was not finite: weights, moments and schedule stayed where they were."""


class Engine(Protocol):
    """Owns the optimiser and the processes. The gradient is that of the *sum of all losses over ranks and
    micro-batches*: the caller divides each loss by the global count, and never again.

    The caller may point `p.data` of a parameter at other tensors for a forward without gradient, provided it restores
    the very same tensors before the next `backward`, `step`, `state_dict` or `load_state_dict`.

    Where an engine `shards_weights`, a parameter is empty outside `whole`. Forwards with gradient may stand outside if
    every rank makes the same ones in the same order; everything else belongs inside.
    """

    module: nn.Module
    """Call this for a forward pass, with or without gradient."""
    rank: int
    world_size: int
    device: torch.device
    shards_weights: bool
    """Whether each rank holds only a part of every weight (ZeRO 3)."""

    def whole(self, *, write: bool = False) -> AbstractContextManager[None]:
        """Inside, this rank has all weights, for as many forwards as it likes, with or without gradient. With `write`,
        what all ranks have written into them alike, in place, is kept. May be nested; collective where outermost."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`. `last` marks the micro-batch that `step` follows; equal counts on every rank."""

    def step(self) -> StepInfo:
        """Clip, update, forget the gradients. Collective."""

    def zero_grad(self) -> None:
        """Forget the accumulated gradients, as if there had been no backward."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of every parameter, of the global sum, fp32 and whole, one after the other: all at once
        would not fit. After a `last` backward, before `step`. Collective."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum of every rank's `x`; collective. Leaves `x` alone."""

    def gather_object(self, obj: T) -> list[T]:
        """Every rank's `obj`, in rank order, on every rank. Collective."""

    def barrier(self) -> None:
        """Wait for every rank."""

    def state_dict(self, keep: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """Moments, master weights where they differ from the module's, and the count of updates; without the weights.

        Whole CPU tensors under names that do not depend on the engine or the world size. Collective; every rank gets
        those whose name it asks to `keep`, which need not be the same ones.
        """

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; the module must hold the weights that belong to it. Collective."""
