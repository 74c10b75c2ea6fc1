"""The data that components exchange: frozen, with named axes.

Axes: P prompts, G samples per prompt, B = P*G samples (prompt-major), K solver steps on T = K + 1 grid times,
N state points in a micro-batch, R rewards.

Time: t in [0, 1], 1 is noise, 0 is data. x_t = (1 - t) x_0 + t eps. Velocity v = dx/dt = eps - x_0.
Images: RGB in [0, 1], fp32, `3 H W`. Latents and times: fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from velatura.core.errors import VelaturaError
from velatura.core.learning_types import Loss as Loss
from velatura.core.learning_types import Points as Points
from velatura.core.learning_types import Requirements as Requirements
from velatura.core.learning_types import Role as Role


class Status(IntEnum):
    """What became of one score. Only `OK` carries a number; everything else is masked, never turned into one."""

    OK = 0
    FAILED = 1
    REFUSED = 2
    NOT_APPLICABLE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request to the model. Two prompts may share a text; the id tells them apart."""

    id: str
    """Unique within its task and split, stable between runs."""
    text: str
    """The prompt, or the edit instruction."""
    task: str
    """The route: `t2i` or `edit`. Distillation chooses the teacher by it."""
    category: str = "general"
    """Chooses reward weights and groups the evaluation."""
    sources: tuple[Tensor, ...] = ()
    """Source images of an edit, each `3 H W`."""
    size: tuple[int, int] | None = None
    """Height and width in pixels of the picture that is asked for; None leaves them to the adapter."""
    target: Tensor | None = None
    """The picture to learn from, `3 H W`; only supervised stages read it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the rewards of this task need to judge a picture; `categories`, where a prompt belongs to several."""
    foreign: bool = False
    """Sent by a client of a reward server: no file is opened that its metadata name."""

    @property
    def membership(self) -> Mapping[str, float]:
        """Category -> share, summing to 1: `metadata["categories"]`, or all of `category`.

        Raises:
            VelaturaError: the shares are none.
        """
        given = self.metadata.get("categories")
        if given is None:
            return {self.category: 1.0}
        return _shares(given, self.id)


def _shares(given: object, prompt: str) -> Mapping[str, float]:
    """Categories with their shares, as a prompt's metadata has them."""
    fits = isinstance(given, Mapping) and all(
        isinstance(name, str) and type(share) in (int, float) and 0 <= share <= 1 for name, share in given.items()
    )
    if not (isinstance(given, Mapping) and fits and abs(sum(given.values()) - 1) <= 1e-6):
        raise VelaturaError(
            f"prompt {prompt!r}: metadata `categories` is {given!r}; write categories with shares that sum to 1, like "
            f'{{"portrait": 0.7, "general": 0.3}}'
        )
    return {name: float(share) for name, share in given.items() if share > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One finished picture."""

    prompt: Prompt
    image: Tensor
    """`3 H W`, RGB in [0, 1]."""
    seed: int
    """The seed of its initial noise: (prompt, seed) pairs samples across models."""
    group: int = 0
    """Samples of one prompt in one rollout share the group id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one reward model says of B samples."""

    values: Tensor
    """[B] fp32; meaningless where the status is not OK."""
    status: tuple[Status, ...]
    """[B]."""
    reasons: tuple[str, ...] = ()
    """[B] or empty: why a score is missing."""
    notes: tuple[str, ...] = ()
    """[B] or empty: what the reward says of its score, for people; a judge's reasoning."""

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The ordinary case: every sample could be judged."""
        return cls(values=values.detach().float().cpu(), status=(Status.OK,) * len(values))

    @classmethod
    def missing(cls, count: int, status: Status, reason: str) -> Self:
        """No sample could be judged."""
        return cls(values=torch.zeros(count), status=(status,) * count, reasons=(reason,) * count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens that a judge has read and written."""

    prompt: int = 0
    """Read, those of pictures among them."""
    completion: int = 0
    """Written."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(prompt=self.prompt + other.prompt, completion=self.completion + other.completion)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(prompt=self.prompt - other.prompt, completion=self.completion - other.completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Which solver steps carry gradient and which carry noise; decided before the rollout."""

    train: Tensor
    """[M] int64, sorted, distinct indices of steps in 0..K-1; step k starts at grid time t[k]."""
    stochastic: Tensor
    """[K] bool: steps that draw noise, where the kernel has any; the others are Euler steps of the ODE."""
    weight: Tensor
    """[K] fp32: weight of a step in the loss."""

    @classmethod
    def training(cls, train: Tensor, *, steps: int, noise: Literal["none", "trained", "all"] = "none") -> Self:
        """Train on the steps named, draw noise on those of `noise`, weigh all alike."""
        stochastic = torch.full((steps,), noise == "all")
        stochastic[train] = noise != "none"
        return cls(train=train, stochastic=stochastic, weight=torch.ones(steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """x_{t_next} given x_t: a Gaussian per latent element."""

    mean: Tensor
    std: Tensor
    """Broadcasts against the mean; 0 is a deterministic step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A state of the sampler and its time."""

    x: Tensor
    """[B ...]."""
    t: Tensor
    """[], or shaped to broadcast against x."""


class Conditioning:
    """What a network needs to know of P prompts. Adapters subclass it; the core moves, selects and hands it back.

    `prepare` of an adapter may attach the part that depends on weights but not on the step (keys and values of the
    prompt's tokens), so that one computation serves every sample and step.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def select(self, rows: Tensor) -> Self:
        """The conditioning of the prompts `rows` [P'], in that order."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """A copy on `device`."""
        raise NotImplementedError

    def join(self, other: Conditioning) -> Conditioning | None:
        """Rows of `self`, then rows of `other`, as one conditioning; None when the two cannot share a forward."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """B finished samples of P prompts, and what training needs to know about how they were made."""

    prompts: tuple[Prompt, ...]
    """[P], those of one layout side by side."""
    samples: tuple[Sample, ...]
    """[B], prompt-major."""
    group: Tensor
    """[B] int64: row of the prompt in `prompts`."""
    parts: tuple[RolloutPart, ...]
    """One for each layout, in the order of the samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPart:
    """The samples of one layout: equal shapes, and a time grid of their own."""

    start: int
    """The first of its b samples among the B of the rollout; the others follow."""
    latents: Tensor
    """[b ...] x at t = 0."""
    times: Tensor
    """[T] grid, 1 down to 0."""
    plan: StepPlan
    trajectory: Tensor | None = None
    """[T b ...] all visited states; kept only when an objective asks for it."""
    log_prob: Tensor | None = None
    """[K b] likelihood of each step when it was drawn, NaN where nothing was; with the trajectory of a kernel that
    draws."""

    @property
    def stop(self) -> int:
        """One past its last sample."""
        return self.start + len(self.latents)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """Scores, statuses and weights of R rewards on B samples."""

    names: tuple[str, ...]
    """[R]."""
    scores: Tensor
    """[B R] fp32, raw; meaningless where not valid."""
    status: Tensor
    """[B R] int64, values of `Status`."""
    weight: Tensor
    """[B R] fp32: weight of the reward for the sample's category, 0 where it does not apply."""
    group: Tensor
    """[B] int64: row of the prompt."""
    prompts: tuple[Prompt, ...]
    """[P]."""
    reasons: tuple[tuple[str, ...], ...] = ()
    """[R][B] or empty: why a score is missing."""
    notes: tuple[tuple[str, ...], ...] = ()
    """[R][B] or empty: what the rewards say of their scores, for people."""
    repeats: Tensor | None = None
    """[K B R] fp32: scores of the same pictures in K further passes, NaN where there is none; None without any."""

    @property
    def valid(self) -> Tensor:
        """[B R] bool: scores that may be used."""
        return self.status == int(Status.OK)

    @property
    def composite(self) -> Tensor:
        """[B] weighted mean of raw valid scores; NaN where a weighted reward failed or none is valid.

        Taken before any normalisation: this is what prompt curation compares.
        """
        active = self.weight * self.valid
        value = (active * self.scores.nan_to_num()).sum(1) / active.sum(1)
        return torch.where(self.complete, value, torch.nan)

    @property
    def complete(self) -> Tensor:
        """[B] bool: at least one weighted reward is valid and none of those that apply failed."""
        applies = (self.weight > 0) & (self.status != int(Status.NOT_APPLICABLE))
        return applies.any(1) & (self.valid | ~applies).all(1)

    def only(self, admission: Admission) -> RewardReport:
        """The same report with the scores of dropped prompts marked not applicable."""
        kept = admission.keep[self.group]
        status = torch.where(kept[:, None], self.status, int(Status.NOT_APPLICABLE))
        return replace(self, status=status)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Which prompts are worth learning from."""

    keep: Tensor
    """[P] bool."""
    reason: tuple[str, ...]
    """[P] one short phrase for the ledger."""
    statistic: Tensor
    """[P] fp32: the number the decision was made on; NaN where it could not be computed."""
    state: tuple[str, ...] = ()
    """[P] or empty: `active`, `flat`, `solved` or `too_hard` (both sleep), `noisy`, `hackable` or `failed` (kept away
    until somebody looked)."""
    threshold: Tensor | None = None
    """[P] fp32 or None: what the statistic was compared with; NaN where there was nothing to compare."""
    borderline: Tensor | None = None
    """[P] bool or None: decisions that another look might turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """How much better than its group each sample is."""

    values: Tensor
    """[B] fp32; 0 where not valid."""
    valid: Tensor
    """[B] bool: samples that may carry a gradient."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def of(self, rows: Tensor) -> Advantages:
        """Those of the samples at `rows` [B']."""
        return replace(self, values=self.values[rows], valid=self.valid[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a component may know of the machine, given once in `setup`."""

    device: torch.device
    cache: Path
    """A folder for downloads and caches that outlives the run."""
    seed: int
    base: Path
    """Folder of the recipe: relative paths in options start here."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the trained network; what stands beside it, frozen, follows."""

    def resolve(self, path: str | Path) -> Path:
        """`path` as the recipe's author meant it."""
        return (self.base / path).resolve()


def group_rows(group: Tensor, count: int) -> Sequence[Tensor]:
    """Indices of the samples of each of `count` groups."""
    return [torch.nonzero(group == p).flatten() for p in range(count)]
