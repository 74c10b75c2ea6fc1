"""The contracts: one abstract class per kind of component. A component is frozen options and one or two pure methods.

This module imports no torch, so that names, options and documentation can be read quickly.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from velatura.core.component import Component as Component
from velatura.core.component import NoOptions as NoOptions
from velatura.core.component import O as O
from velatura.core.component import Options as Options
from velatura.core.remembering import Remembers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from velatura.core import events
    from velatura.core.calibrated import Calibration
    from velatura.core.footprint import Footprint
    from velatura.core.types import (
        Admission,
        Advantages,
        Conditioning,
        Context,
        Loss,
        Points,
        Prompt,
        Requirements,
        RewardReport,
        Role,
        Sample,
        Scores,
        State,
        StepPlan,
        Transition,
        Usage,
    )


class RewardModel(Component[O]):
    """Judges finished images. Never sees latents, the policy, or the other rewards."""

    kind: ClassVar[str] = "reward"
    scope: ClassVar[Literal["sample", "group"]] = "sample"
    """`sample`: a score needs its picture alone; `group`: `samples` are all of one prompt, for judges that compare."""

    def applies(self, prompt: Prompt) -> bool:
        """Whether this reward has something to say about pictures for `prompt`.

        Decided from the prompt and its source images, never from the output: a gate on the output is a gate the
        policy learns to close.
        """
        return True

    cached: ClassVar[bool] = False
    """Whether a picture that was scored before keeps its score, unless the recipe says otherwise: for judges that take
    long."""

    def fingerprint(self, context: Context) -> str:
        """Changes when its scores of the same pictures may: by default with name, options but the operational ones, and
        the content of files and folders that they name. Asked before `setup`, too, so it loads nothing."""
        from velatura.core.fingerprint import options_fingerprint

        return options_fingerprint(self, context)

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Scores:
        """One score per sample, higher is better. What cannot be judged gets a `Status`, never a made-up number."""

    operational: ClassVar[frozenset[str]] = frozenset()
    """Options that say where and how fast it runs, not what it says: cards, kept scores and finished stages hold,
    whatever they are. One within another is named with dots: `judge.server`."""

    def needs_card(self) -> bool:
        """Whether it is an opinion, prompted or learned, and no measurement: a policy is trained on one that a reward
        card has compared with people, or under `allow_unvalidated_reward`."""
        return False

    def dimension(self) -> str:
        """What it judges: `alignment`, `aesthetics`, `quality`, `portrait`, `edit-instruction`, `edit-quality`,
        `preservation`, or a word of its own. The perturbations of a reward card take their expectations from it."""
        return "quality"

    def expectations(self) -> Mapping[str, str]:
        """Perturbation -> `falls`, `no-gain` or `any`, where that differs from what its dimension says."""
        return {}

    def identity(self) -> Mapping[str, str]:
        """What its scores depend on beside its options and the files they name: the content of a rubric. By name, so
        that a change can be told; known before `setup`."""
        return {}

    def usage(self) -> Usage | None:
        """Tokens since `setup`; None for a reward that has none, or cannot count them."""
        return None


@runtime_checkable
class ComparesPairs(Protocol):
    """A judge of pairs that can be asked in one order, so that a reward card can see how much the place weighs."""

    def prefer(self, pairs: Sequence[tuple[Sample, Sample]]) -> Scores:
        """[N] how much better the picture shown first is, in [0, 1]; 1/2 is a tie."""


class PromptFilter(Component[O]):
    """Which prompts are worth learning from. Used by the `curate` stage, and online by `rl`."""

    kind: ClassVar[str] = "prompt_filter"

    @abstractmethod
    def admit(self, report: RewardReport) -> Admission:
        """Keep or drop each of the P prompts, with a reason. Sees raw scores, before normalisation."""


class GuidancePolicy(Component[O]):
    """Who is guided, and how much: a scale for each role and time, so hybrid CFG is a table, not an `if`."""

    kind: ClassVar[str] = "guidance"
    detach_null: ClassVar[bool] = False
    """Whether the unconditional branch of CURRENT carries no gradient."""

    @abstractmethod
    def scale(self, role: Role, t: Tensor) -> Tensor:
        """Guidance scale [N] of a role at times t [N]. Where all are 1 the null branch is not evaluated at all."""


class Kernel(Component[O]):
    """One step of the sampler, as a distribution. Pure; fp32 in, fp32 out."""

    kind: ClassVar[str] = "kernel"
    stochastic: ClassVar[bool] = False
    keeps_marginals: ClassVar[bool] = True
    """Whether small steps take x_t to x_{t_next} in distribution, whatever the data."""
    evaluations: ClassVar[int] = 1
    """Velocities that a step asks for: 2 for a kernel with a `midway`, which is deterministic."""

    @abstractmethod
    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Mean and std of x_{t_next} given x_t [B ...], velocity [B ...] and times, [] or shaped to broadcast against
        x; std 0 is the ODE. A step on which the plan draws no noise is the Euler step of the ODE instead."""

    def midway(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> State | None:
        """Where a second velocity is to be taken, from that at x; None, by default, where one is enough."""
        return None

    def corrected(self, v: Tensor, v_midway: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """x_{t_next} [B ...] from the velocities at x and at `midway`; `step` is what it is without the second."""
        return self.step(v, x, t, t_next).mean

    def log_prob(self, x: Tensor, transition: Transition) -> Tensor:
        """[B] log-density of x [B ...] under a transition, the *mean* over latent dimensions; NaN where std is 0.

        -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2. The mean is the convention of the field: the ratio of
        two policies is the geometric mean over dimensions, and clip ranges of 1e-5 to 1e-3 are small only if it is so.
        """
        error = (x - transition.mean) / transition.std
        density = -error.square() / 2 - transition.std.log() - math.log(2 * math.pi) / 2
        return density.flatten(1).mean(1)


class TimestepSampler(Component[O]):
    """Which of the K steps carry noise, and which carry gradient. Decided before the rollout."""

    kind: ClassVar[str] = "timesteps"

    @abstractmethod
    def plan(self, t: Tensor, generator: torch.Generator) -> StepPlan:
        """A plan for the grid t [T], 1 down to 0. The same generator state gives the same plan on every rank."""

    def plan_at(self, step: int, t: Tensor, generator: torch.Generator) -> StepPlan:
        """The plan of step `step` of the loop, for samplers that move along; `plan`, for all others."""
        return self.plan(t, generator)

    def complaint(self, steps: int) -> str:
        """What is wrong with these options for a solver of `steps` steps, empty when nothing is. Asked before anything
        runs."""
        return ""


class AdvantageEstimator(Component[O]):
    """From scores to how much better than its group each sample is."""

    kind: ClassVar[str] = "advantage"

    @abstractmethod
    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages; groups by id, never by text; 0 and not valid where a score is missing."""

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """What is wrong with these options in a stage with these rewards (name -> largest weight), empty when nothing
        is. Asked before anything runs; `calibrated`: whether `calibrate` will be called."""
        return ""

    def calibrate(self, calibration: Calibration) -> None:
        """What a calibrate stage measured; given after `setup`, and again whenever a stage weighs its rewards anew."""

    def unprepared(self, weights: Mapping[str, Mapping[str, float]]) -> str:
        """What it does not know of the stage's prompts (category -> reward -> largest weight there), empty when nothing
        is missing. Asked once after `calibrate`, before anything is drawn."""
        return ""

    def state_dict(self) -> Mapping[str, Tensor]:
        """What it remembers of earlier steps, as tensors for the checkpoint; nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there, bit for bit."""


class PolicyObjective(Component[O]):
    """A loss in velocities. Holds no model, runs no loop."""

    kind: ClassVar[str] = "objective"
    requires: Requirements
    """What the core must provide; stands on the class."""

    @abstractmethod
    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """`velocity[role]` is [N ...] at `points`; only CURRENT carries gradient."""

    def roles(self) -> frozenset[Role]:
        """The roles these options need: `requires.roles`, less those whose coefficient is 0."""
        return self.requires.roles

    def old_decay(self, step: int) -> float:
        """How much of the old policy survives after round `step`: old <- d old + (1 - d) current."""
        return 0.0

    def ema_decay(self, step: int) -> float:
        """The same of EMA, an average that no samples are drawn from."""
        return 0.0


class Distiller(PolicyObjective[O]):
    """An objective whose target is a teacher's velocity on the student's own trajectory."""

    kind: ClassVar[str] = "distiller"

    def teacher(self, prompt: Prompt) -> str:
        """Which of the configured teachers answers for this prompt: by default the one named like its task."""
        return prompt.task


class ModelAdapter(Component[O]):
    """All that is special to one network. Knows nothing of rewards and objectives."""

    kind: ClassVar[str] = "adapter"

    @abstractmethod
    def load(self, device: torch.device) -> nn.Module:
        """The network, with `requires_grad` set on what is to be trained (LoRA weights or all)."""

    def layout(self, prompt: Prompt) -> Hashable:
        """What must be equal for two prompts to share a batch: size of the picture, number and size of its sources."""
        return (prompt.size, *(tuple(source.shape) for source in prompt.sources))

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The conditioning of P prompts: row p for prompts[p]. Deterministic, without gradient."""

    @abstractmethod
    def null(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The unconditional counterpart of P prompts (for an edit it keeps the source images)."""

    def prepare(self, net: nn.Module, cond: Conditioning) -> Conditioning:
        """`cond` with everything computed that depends on the weights but neither on x nor on t.

        Carries gradient when called with gradients enabled. The default has nothing to prepare.
        """
        return cond

    @abstractmethod
    def noise(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        """[B ...] fp32 x at t = 1; row b depends on prompts[b] (its layout) and seeds[b] alone."""

    @abstractmethod
    def times(self, steps: int, prompt: Prompt | None = None) -> Tensor:
        """[steps + 1] fp32 grid, 1 down to 0, the family's shift applied."""

    @abstractmethod
    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt = eps - x_0, [N ...], at x [N ...], t [N]; point n belongs to row rows[n] of `cond`."""

    def guide(self, cond: Tensor, null: Tensor, scale: Tensor) -> Tensor:
        """The family's own guidance rule; by default null + scale (cond - null), `scale` [N]."""
        return null + scale.reshape(-1, *[1] * (cond.ndim - 1)) * (cond - null)

    @abstractmethod
    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents at t = 0 [B ...] to images [B 3 H W], RGB in [0, 1]; `prompt` is one of theirs, for its size."""

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B ...]: the inverse of `decode`, for supervised stages."""

    @abstractmethod
    def export(self, net: nn.Module, folder: Path, *, info: Mapping[str, Any]) -> None:
        """Write a model that stock libraries load, with `info` (guidance scale, lineage) beside it."""

    def fingerprint(self) -> str:
        """Changes when the weights that `load` starts from do; empty where `describe` names a single file."""
        return ""

    def describe(self) -> Mapping[str, Any]:
        """Facts for `velatura check`: parameters, image size, tokens per sample, and where weights come from."""
        return {}

    def footprint(self, prompt: Prompt) -> Footprint | None:
        """What `velatura check` measures memory on: the network without weights, and what it is told of `prompt`."""
        return None


class Task(Component[O]):
    """Where prompts come from: text-to-image, or edits with their source images."""

    kind: ClassVar[str] = "task"

    @abstractmethod
    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """All prompts of a split, in a fixed order. May be lazy: only `len` and indexing are used."""


class Evaluator(Component[O]):
    """Measures pictures. Never trains on what it measures."""

    kind: ClassVar[str] = "evaluator"

    @abstractmethod
    def evaluate(self, samples: Sequence[Sample]) -> Mapping[str, Sequence[float | None]]:
        """Each metric as one value per sample, None where it does not apply. The core forms means, paired
        differences and intervals from them, because only the core knows which model is compared with which."""


class Observer(Remembers, Component[O]):
    """Trackers and callbacks: one no-op method per event. They watch; they cannot change."""

    kind: ClassVar[str] = "observer"

    def run_start(self, event: events.RunStart) -> None:
        """A stage begins."""

    def rollout_done(self, event: events.RolloutDone) -> None:
        """Samples were made and judged."""

    def step_end(self, event: events.StepEnd) -> None:
        """One step of the loop is over."""

    def checkpoint_saved(self, event: events.CheckpointSaved) -> None:
        """A checkpoint is complete on disk."""

    def run_end(self, event: events.RunEnd) -> None:
        """A stage is over, finished or failed."""
