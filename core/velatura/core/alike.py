"""Before anything is learned: do all processes hold the same weights, and are they about to do the same?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from velatura.core.errors import SelfCheckError
from velatura.core.ranks import Ranks
from velatura.core.types import Prompt, StepPlan

CHUNK = 1 << 22
"""Elements that are summed at once."""
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> integers that hold its bits."""


def require_same(ranks: Ranks, facts: Mapping[str, str], when: str) -> None:
    """Compare facts by name over all processes. Collective.

    Raises:
        SelfCheckError: the first fact that differs, and on which process; on every rank.
    """
    every = ranks.gather(dict(facts))
    for rank, other in enumerate(every):
        for name, value in every[0].items():
            if other.get(name) != value:
                raise SelfCheckError(
                    f"{when} process {rank} has another {name} than process 0: {_short(other.get(name))} and "
                    f"{_short(value)}. All processes need the same recipe, files and versions of libraries, and a run "
                    f"folder that they share."
                )


def require_same_weights(ranks: Ranks, net: nn.Module, when: str) -> None:
    """Compare every parameter, trained or not, bit for bit by a checksum. Collective.

    Raises:
        SelfCheckError: the first parameter that differs, on every rank.
    """
    if ranks.size == 1:
        return
    sums = {name: checksum(parameter.detach()) for name, parameter in net.named_parameters()}
    if len(set(ranks.gather(digest(sums)))) == 1:
        return
    every = ranks.gather(sums)
    rank, name = next(
        (rank, name)
        for rank, other in enumerate(every)
        for name in dict.fromkeys((*every[0], *other))
        if every[0].get(name) != other.get(name)
    )
    raise SelfCheckError(
        f"{when} process {rank} holds other weights than process 0, first in {name!r}. They have read different files, "
        f"or went on from different checkpoints: give all processes the same base weights and a run folder they share."
    )


def checksum(tensor: Tensor) -> int:
    """A 64-bit sum of the bits of a tensor, each element times an odd number of its own; made where the tensor is."""
    bits = tensor.contiguous().view(-1).view(WHOLE[tensor.element_size()])
    total = tensor.numel()
    for number, start in enumerate(range(0, len(bits), CHUNK)):
        part = bits[start : start + CHUNK].to(torch.int64)
        factors = 2 * torch.arange(len(part), device=part.device) + 1
        total = (31 * total + number + int((part * factors).sum())) % (1 << 64)
    return total


def plan_facts(prompts: Sequence[Prompt], times: Tensor, plan: StepPlan) -> dict[str, str]:
    """What one step is about to do, as short texts that can be compared."""
    return {
        "list of prompts": digest([prompt.id for prompt in prompts]),
        "time grid": digest(times.tolist()),
        "plan of trained steps": digest([plan.train.tolist(), plan.weight.tolist()]),
        "plan of noisy steps": digest(plan.stochastic.tolist()),
    }


def digest(data: Any) -> str:
    """Short hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _short(value: str | None) -> str:
    return "nothing" if value is None else value
