"""What observers are told. Frozen, so that watching cannot change a run; new fields never break an observer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from velatura.core.types import RewardReport, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """A stage begins, or goes on after an interruption."""

    stage: str
    """Name of the stage in the recipe."""
    kind: str
    """Its kind: rl, distill, ..."""
    folder: Path
    """Where its results go."""
    step: int
    """First step that will be done; 0 for a new run."""
    total: int
    """Number of steps."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutDone:
    """Samples were made and judged."""

    step: int
    rollout: Rollout
    """What this process drew; observers live in the first."""
    report: RewardReport | None
    """Its scores, row by row those of `rollout.samples`."""
    whole: RewardReport | None = None
    """The scores of all processes, prompt by prompt: what the policy learns from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    """One step of the loop is over."""

    step: int
    """0-based index of the step that ended."""
    metrics: Mapping[str, float]
    """Everything measured in this step, by name with slashes: `reward/alignment/mean`, `time/rollout_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    step: int
    """Steps done so far."""
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """A stage is over."""

    step: int
    """Steps done."""
    error: str | None = None
    """Why it failed; None when it finished."""
