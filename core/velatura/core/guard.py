"""What is not finite is never stepped on: the update is skipped on all processes alike, counted, kept and told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger

from velatura.core.errors import CheckpointError, NotFiniteError
from velatura.core.points import MicroBatch

if TYPE_CHECKING:
    from velatura.core.kept_batches import Keepable
    from velatura.core.policy import Policy
    from velatura.core.ranks import Ranks

FOLDER = "nonfinite"
"""Below the stage: one folder for each batch that was kept."""
KEPT = 4
"""So many batches are kept of a stage: the first ones say what there is to say."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not finite in an update."""

    rank: int
    batch: int | None
    """Number of the micro-batch on this rank; None where it is not known, as for a gradient, which is a sum."""
    what: str
    """`the loss is nan`."""

    def __str__(self) -> str:
        where = "" if self.batch is None else f" of micro-batch {self.batch} of process {self.rank}"
        name, _, rest = self.what.partition(" is ")
        return f"{name}{where} is {rest}"


def fault_of(rank: int, number: int, batch: MicroBatch, loss: float) -> Fault | None:
    """What is wrong with a micro-batch whose loss is known; None where nothing is.

    Advantages are looked at themselves: an objective that clips them makes a finite loss of an infinite one.
    """
    if not bool(torch.isfinite(batch.points.advantage).all()):
        return Fault(rank, number, "an advantage is not finite")
    if not math.isfinite(loss):
        return Fault(rank, number, f"the loss is {loss}")
    return None


class Guard:
    """Counts the updates of a stage that were not taken, keeps what they were made of, and stops above a budget."""

    def __init__(
        self, *, name: str, folder: Path, ranks: Ranks, policy: Policy, limit: int, at: str, before: int = 0
    ) -> None:
        """`name` and `folder` of the stage; `limit`: its `max_skipped`, which stands at `at`; `before`: how many were
        skipped before the run was cut off."""
        self.name, self.folder, self.ranks, self.policy, self.limit, self.at = name, folder, ranks, policy, limit, at
        self.skipped = before
        self._step, self._update, self._now = 0, -1, 0
        self._last = ""

    def begin(self, step: int) -> None:
        """A step of the stage begins."""
        self._step, self._update, self._now = step, -1, 0

    def next_update(self) -> None:
        """An optimiser step of the stage's step begins."""
        self._update += 1

    @property
    def metrics(self) -> dict[str, float]:
        """Of the step so far."""
        return {"skipped": float(self._now)}

    def refuse(self, faults: Sequence[Fault], parts: Sequence[Keepable]) -> None:
        """Count an update that was not taken because of `faults`, the same on every rank, and keep this rank's part of
        it: of `parts`, its micro-batches, those that are at fault, and all where that is not known.

        Collective.
        """
        self.skipped += 1
        self._now += 1
        kept = self._keep(faults, parts)
        self._last = f"step {self._step}, update {self._update}: {faults[0]}"
        told = f" See what it was: velatura replay {kept}" if kept else ""
        logger.warning(
            "{}: an update was not taken ({}). Skipped so far: {} of at most {}.{}",
            self.name, self._last, self.skipped, self.limit, told,
        )  # fmt: skip

    def require_budget(self) -> None:
        """Stop when too many updates were skipped.

        Raises:
            NotFiniteError: with what the last one was and how to look at it.
        """
        if self._now == 0 or self.skipped <= self.limit:
            return
        kept = sorted((self.folder / FOLDER).glob("step-*"))
        look = f" See what it was with `velatura replay {kept[-1]}`." if kept else ""
        raise NotFiniteError(
            f"{self.at}: {self.skipped} updates of stage '{self.name}' were not finite, and the budget is "
            f"{self.limit}. The last was {self._last}. No weight was moved by them.{look} Lower the learning rate, "
            f"take fp32, or mend what is broken, and start again: checkpoints are kept."
        )

    def _keep(self, faults: Sequence[Fault], parts: Sequence[Keepable]) -> Path | None:
        """Write this rank's part of the update, and on the first rank the weights; None where enough is kept."""
        from velatura.core.kept_batches import write_kept

        folder = self.folder / FOLDER / f"step-{self._step:06d}-update-{self._update}"
        others = self.ranks.from_first(lambda: sum(p != folder for p in (self.folder / FOLDER).glob("step-*")))
        if others >= KEPT:
            return None
        named = {fault.batch for fault in faults if fault.rank == self.ranks.rank and fault.batch is not None}
        known = any(fault.batch is not None for fault in faults)
        chosen = [part for part in parts if part.number in named or not known]
        facts: dict[str, Any] = {
            "stage": self.name, "step": self._step, "update": self._update, "processes": self.ranks.size,
            "faults": [str(fault) for fault in faults],
        }  # fmt: skip
        try:
            with self.policy.gathered():
                weights = self.policy.weights() if self.ranks.first else None
                write_kept(folder, self.ranks.rank, chosen, weights, facts)
        except (OSError, ValueError, CheckpointError) as error:
            logger.warning("{}: the batch could not be kept in {}: {}", self.name, folder, error)
        self.ranks.barrier()
        return folder
