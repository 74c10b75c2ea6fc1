"""What objectives are given and give back: roles, state points, requirements, losses. Re-exported by `types`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from velatura.core.components import Kernel


class Role(StrEnum):
    """Whose weights answer, and under which guidance."""

    ROLLOUT = "rollout"
    CURRENT = "current"
    OLD = "old"
    REFERENCE = "reference"
    TEACHER = "teacher"
    EMA = "ema"
    """A moving average of the current weights, beside OLD: nothing is drawn from it."""
    ANCHOR = "anchor"
    """A finished model that holds the policy near it on all data, whatever a prompt's teacher is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """N states at which velocities are compared."""

    x: Tensor
    """[N ...] x_t."""
    t: Tensor
    """[N]."""
    advantage: Tensor
    """[N]; 0 where the objective needs none."""
    weight: Tensor
    """[N] weight of the point in the loss; weights sum to the share of the batch in this micro-batch."""
    x0: Tensor | None = None
    """[N ...] the clean latents, for forward-process points."""
    target: Tensor | None = None
    """[N ...] u = eps - x_0, for forward-process points."""
    x_next: Tensor | None = None
    """[N ...] the next visited state, for trajectory points."""
    t_next: Tensor | None = None
    """[N]."""
    kernel: Kernel[Any] | None = None
    """What drew x_next, for trajectory points."""
    log_prob: Tensor | None = None
    """[N] log-likelihood of x_next when it was drawn; NaN where nothing was."""
    group: Tensor | None = None
    """[N] int64: row of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What an objective needs; compared with the other slots before anything runs."""

    points: Literal["forward", "trajectory", "any"] = "forward"
    """`forward`: re-noised clean latents; `trajectory`: states visited by the rollout; `any`: whichever the objective
    that it is added to takes, re-noised latents when it stands alone."""
    roles: frozenset[Role] = frozenset({Role.CURRENT})
    """Velocities handed to `loss`."""
    rollout_role: Role = Role.CURRENT
    """Whose weights make the samples."""
    advantage: bool = True
    """Needs rewards."""
    stochastic_steps: bool = False
    """Needs a kernel that draws noise, and is trained only on steps that did."""
    contrast: bool = True
    """A sample as good as its group gives no gradient; the self-check holds the objective to it."""
    whole_group: bool = False
    """Compares the points of a group with each other: all its samples come in one micro-batch."""
    shared_noise: bool = False
    """Samples of a group are re-noised with the same noise at the same times."""
    several_updates: bool = True
    """Still right when earlier updates of the round have moved the policy away from the one that sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A scalar to go down, and the numbers a practitioner looks at."""

    value: Tensor
    """[] the weighted sum over points (`Points.weight`)."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars without gradient."""
    by_time: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers of each point [N], without gradient, that are reported for every quarter of the time."""
