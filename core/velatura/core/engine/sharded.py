"""Weights that ZeRO 3 deals out to all ranks, made whole for a phase. It works on DeepSpeed's objects, unimported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WholeWeights:
    """One gathering for as many forwards as each rank likes.

    Left to itself, ZeRO 3 gathers every layer when it is reached, together with all other ranks: a rank that makes one
    forward more than the others waits for ever, and hooks that a lone rank runs break the order that they have
    recorded. So inside, the hooks of the modules are off and all parameters are there.
    """

    def __init__(self, engine: Any) -> None:
        self._offload = engine.optimizer.parameter_offload
        self._parameters: list[Any] = sorted(set(engine.module.parameters()), key=lambda p: int(p.ds_id))
        self._depth = 0
        self._written = False

    @contextmanager
    def __call__(self, *, write: bool) -> Iterator[None]:
        """All weights on this rank; `write`: what is written into them stays."""
        self._written |= write
        if self._depth == 0:
            self._gather()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._release()

    def _gather(self) -> None:
        self._offload.get_param_coordinator().release_and_reset_all(self._offload.module)  # also what is on its way
        self._offload._remove_module_hooks()
        for hooks in (self._offload.forward_hooks, self._offload.backward_hooks):
            hooks.clear()  # it only ever appends: after ten thousand phases these are millions of dead handles
        self._parameters[0].all_gather(param_list=self._parameters)

    def _release(self) -> None:
        """Talks to no other rank, so that an error inside cannot end in waiting for one that had none."""
        self._parameters[0].partition(param_list=self._parameters, has_been_updated=self._written)
        self._written = False
        self._offload.setup_zero_stage3_hooks()


def own_part(parameter: Any, value: Tensor, rank: int) -> Tensor:
    """The elements of `value` that belong to the shard of this rank, zeros behind the end."""
    size = int(parameter.ds_tensor.numel())
    mine = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(mine, (0, size - mine.numel()))


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of a weight, also where it is sharded and empty."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
