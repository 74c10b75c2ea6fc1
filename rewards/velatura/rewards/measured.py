"""Rewards that take one picture at a time: a number, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from velatura.api import Sample, Scores, Status


@dataclass(frozen=True, slots=True)
class Measured:
    """What is said of one picture."""

    value: float = 0.0
    """Meaningless unless the status is OK."""
    status: Status = Status.OK
    reason: str = ""
    """Why there is no value."""
    note: str = ""
    """Of the value, for people."""


def measured(samples: Sequence[Sample], measure: Callable[[Sample], Measured]) -> Scores:
    """[B] what `measure` says of each picture; those with values that are not finite fail without being shown."""
    broken = Measured(status=Status.FAILED, reason="The picture holds values that are not finite")
    found = [measure(sample) if bool(sample.image.isfinite().all()) else broken for sample in samples]
    return Scores(
        values=torch.tensor([one.value for one in found], dtype=torch.float32),
        status=tuple(one.status for one in found),
        reasons=tuple(one.reason for one in found),
        notes=tuple(one.note for one in found),
    )
