"""Micro-batches on disk: safetensors for tensors, JSON for the rest, each file whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from velatura.core.checkpoint import write_json_atomic
from velatura.core.components import Kernel
from velatura.core.errors import CheckpointError
from velatura.core.points import MicroBatch
from velatura.core.types import Points, Prompt, Role

if TYPE_CHECKING:
    from velatura.core.learner import Frozen

POLICY = "policy.safetensors"
FACTS = "batch.json"
_ABOUT = ("id", "text", "task", "category")


class Keepable(Protocol):
    """A micro-batch that can be kept."""

    @property
    def number(self) -> int:
        """Of the micro-batch among those of its rank."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What of it is tensors."""

    def about(self) -> Mapping[str, Any]:
        """What of it is none; its `number` is among it."""


P = TypeVar("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A micro-batch, with the velocities of the roles that have no gradient."""

    number: int
    """Of the micro-batch among those of its rank."""
    batch: MicroBatch
    frozen: Frozen
    rank: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Points, sources of edits, and velocities."""
        points, batch = self.batch.points, self.batch
        found = {f"points/{f.name}": getattr(points, f.name) for f in fields(Points)}
        found |= {f"frozen/{role}": velocity for role, velocity in self.frozen.items()}
        found |= {
            f"source/{p}/{s}": one for p, prompt in enumerate(batch.prompts) for s, one in enumerate(prompt.sources)
        }
        return {"rows": batch.rows} | {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def about(self) -> dict[str, Any]:
        """Prompts, and which teacher answers."""
        return {
            "number": self.number, "teacher": self.batch.teacher, "drawn": self.batch.points.kernel is not None,
            "same_as_current": [str(role) for role, velocity in self.frozen.items() if velocity is None],
            "prompts": [
                about_prompt(prompt) | {"size": prompt.size, "sources": len(prompt.sources)}
                for prompt in self.batch.prompts
            ],
        }  # fmt: skip


def about_prompt(prompt: Prompt) -> dict[str, str]:
    """What of a prompt is text."""
    return {name: getattr(prompt, name) for name in _ABOUT}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptUpdate(Generic[P]):
    """What was kept of an update that was not taken."""

    facts: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    """The trained tensors as they were."""
    batches: Sequence[P]
    """Micro-batches of all ranks."""


def write_kept(
    folder: Path, rank: int, kept: Sequence[Keepable], weights: Mapping[str, Tensor] | None, facts: Mapping[str, Any]
) -> None:
    """Write what a rank keeps of an update; whoever holds the weights, the first rank, writes them and `facts`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    about = []
    for part in kept:
        tensors |= {f"{part.number}/{name}": tensor for name, tensor in part.tensors().items()}
        about.append(part.about())
    _save(folder / f"process-{rank}.safetensors", tensors)
    write_json_atomic(folder / f"process-{rank}.json", about)
    if weights is not None:
        _save(folder / POLICY, weights)
        write_json_atomic(folder / FACTS, dict(facts))


def read_kept(folder: Path, kernel: Kernel[Any] | None) -> KeptUpdate[Kept]:
    """What `write_kept` wrote of state points on all ranks. `kernel`: of the stage, for points that it drew.

    Raises:
        CheckpointError: something is missing or broken.
    """
    return read_parts(folder, partial(_kept, kernel=kernel))


def read_parts(folder: Path, make: Callable[[int, Mapping[str, Any], Mapping[str, Tensor]], P]) -> KeptUpdate[P]:
    """What `write_kept` wrote on all ranks; `make` is given a rank, and what a part is about and its tensors.

    Raises:
        CheckpointError: something is missing or broken.
    """
    facts = _json(folder / FACTS)
    batches = []
    for rank in range(facts["processes"]):
        tensors = _load(folder / f"process-{rank}.safetensors")
        for about in _json(folder / f"process-{rank}.json"):
            prefix = f"{about['number']}/"
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            batches.append(make(rank, about, own))
    return KeptUpdate(facts=facts, weights=_load(folder / POLICY), batches=batches)


def _kept(rank: int, about: Mapping[str, Any], own: Mapping[str, Tensor], kernel: Kernel[Any] | None) -> Kept:
    prompts = tuple(
        Prompt(
            **{name: one[name] for name in _ABOUT}, size=one["size"] and tuple(one["size"]),
            sources=tuple(own[f"source/{p}/{s}"] for s in range(one["sources"])),
        )
        for p, one in enumerate(about["prompts"])
    )  # fmt: skip
    given = {name.removeprefix("points/"): value for name, value in own.items() if name.startswith("points/")}
    frozen: dict[Role, Tensor | None] = {Role(name): None for name in about["same_as_current"]}
    frozen |= {Role(n.removeprefix("frozen/")): value for n, value in own.items() if n.startswith("frozen/")}
    points = Points(**given, kernel=kernel if about["drawn"] else None)
    batch = MicroBatch(prompts=prompts, rows=own["rows"], points=points, teacher=about["teacher"])
    return Kept(number=about["number"], batch=batch, frozen=frozen, rank=rank)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); without it the update cannot be replayed.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); without it the update cannot be replayed.") from error
