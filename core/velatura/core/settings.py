"""What a recipe may say: frozen, typed, every default written here and nowhere else. Data only; no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from velatura.core.base_settings import (
    Count,
    Positive,
    Real,
    Ref,
    Settings,
    Share,
    WeightedRef,
    Whole,
    only_one,
)
from velatura.core.engine_settings import Engine as Engine
from velatura.core.engine_settings import Optimizer as Optimizer
from velatura.core.errors import suggest
from velatura.core.learning_settings import ANCHOR, PLUS, SOLVER, STEP_WEIGHT, StepWeight, sums_to_one
from velatura.core.learning_settings import StepWeightName as StepWeightName
from velatura.core.reward_settings import Recalibrate, RewardRef


class Sampling(Settings):
    """How pictures are made."""

    steps: Count = Field(40, description="Steps of the solver.")
    batch: Count = Field(64, description="Most transformer rows in one forward of a rollout; a guided sample has two.")


def leaves_warmup(optimizer: Optimizer, updates: int) -> None:
    """A learning rate that goes down does so after the warm-up, so something has to come after it."""
    if optimizer.schedule != "constant" and updates <= optimizer.warmup:
        raise ValueError(
            f"optimizer.schedule {optimizer.schedule} goes down after the warm-up of {optimizer.warmup}, but the stage "
            f"has only {updates} optimiser steps. Take a smaller warmup, or schedule constant"
        )


def group_of(value: int, why: str) -> int:
    """A size of groups in which something can be compared."""
    if value < 2:
        raise ValueError(f"a group of {value} teaches nothing: {why}. Take 2 or more; 8 to 24 is usual")
    return value


class CurateStage(Settings):
    """Finds the prompts worth learning from: those on which a model's own samples differ in quality."""

    stage: Literal["curate"]
    adapter: Ref
    task: Ref
    guidance: Ref = Ref(use="rollout-only")
    kernel: Ref = Ref(use="ode")
    sampling: Sampling = Sampling()
    rewards: list[RewardRef] = Field(min_length=1)
    weights_from: str | None = Field(
        None, description="The calibrate stage that finds the weights of the rewards, in place of those written here."
    )
    prompt_filter: Ref = Ref(use="range")
    group_size: Annotated[int, Field(strict=True)] = Field(8, description="Samples per prompt.")
    model: str = Field("base", description="Whose samples are judged.")
    max_prompts: Count | None = Field(None, description="Look at the first so many prompts only.")
    max_failed: Share = Field(0.05, description="Stop when a larger share of scores failed.")
    repeats: Count | None = Field(
        None, description="How often each picture is scored; from 2 on the filter knows the rewards' noise."
    )
    confirm: bool | None = Field(
        None, description="Sample prompts near the threshold again, with fresh seeds, before it is decided."
    )
    after: str | None = Field(
        None, description="An earlier curate stage: what it kept stays, and the prompts that slept are screened again."
    )

    @field_validator("group_size")
    @classmethod
    def _compares(cls, value: int) -> int:
        return group_of(value, "curation compares the samples of a prompt with each other")


class RLStage(Settings):
    """Reinforcement learning: sample, judge, learn, repeat."""

    stage: Literal["rl"]
    adapter: Ref
    task: Ref | None = Field(None, description="Where prompts come from, when no curate stage chose them.")
    prompts: str | None = Field(None, description="The curate stage whose kept prompts are trained on.")
    guidance: Ref = Ref(use="rollout-only")
    kernel: Ref = Ref(use="ode")
    solver: Ref | None = Field(None, description=SOLVER)
    timesteps: Ref = Ref(use="high-noise")
    step_weight: StepWeight = Field("uniform", description=STEP_WEIGHT)
    allow_biased_ratio: Annotated[bool, Field(strict=True)] = Field(
        False,
        description="Let an objective with a likelihood ratio learn from rollouts under another guidance than its "
        "own. The first ratio is still 1, but says nothing of the policy that drew the samples.",
    )
    rewards: list[RewardRef] = Field(min_length=1)
    weights_from: str | None = Field(
        None, description="The calibrate stage that finds the weights of the rewards, in place of those written here."
    )
    recalibrate: Recalibrate | None = Field(
        None, description="Finds the weights of `weights_from` anew while the policy changes; null keeps them."
    )
    advantage: Ref = Ref(use="group-z")
    objective: Ref = Ref(use="nft")
    plus: list[WeightedRef] = Field(default_factory=list, description=PLUS)
    anchor: str | None = Field(None, description=ANCHOR)
    prompt_filter: Ref | None = Field(None, description="Drops prompts during training, by their own samples.")
    sampling: Sampling = Sampling()
    optimizer: Optimizer = Optimizer()
    observers: list[Ref] = Field(default_factory=list)
    init: str = Field("base", description="The model to start from: `base` or a stage.")
    steps: Count = Field(100, description="Rounds of sampling and learning.")
    prompts_per_step: Count = Field(16, description="Prompts in a round.")
    group_size: Annotated[int, Field(strict=True)] = Field(16, description="Samples per prompt.")
    updates_per_step: Count = Field(1, description="Optimiser steps on the samples of a round.")
    micro_batch: Count = Field(256, description="State points in one forward of an update.")
    share_noise: bool = Field(True, description="Forward-process points of a group share their noise.")
    checkpoint_every: Count = Field(
        1, description="Steps between checkpoints: how many a run that is cut off may have to repeat."
    )
    pictures_every: Count = Field(10, description="Steps between the pictures that show how the model changes.")
    keep_checkpoints: Count = Field(2, description="How many checkpoints to keep.")
    max_skipped: Whole = Field(10, description="Stop when more updates were skipped because they were not finite.")
    keep_every: Count | None = Field(None, description="Keep also those whose step is a multiple of this.")
    max_failed: Share = Field(0.05, description="Stop when a larger share of scores failed.")
    probe_prompts: Whole = Field(
        8, description="Prompts whose states under the first policy measure how far it goes; 0 measures nothing."
    )
    probe_every: Count = Field(10, description="Steps between such measurements.")
    allow_unvalidated_reward: Annotated[bool, Field(strict=True)] = Field(
        False,
        exclude=True,  # nothing that a stage makes depends on it
        description="Train on judges and learned rewards that have no reward card which passes; every report says so.",
    )

    @field_validator("group_size")
    @classmethod
    def _compares(cls, value: int) -> int:
        return group_of(value, "an advantage says how much better a sample is than the rest of its group")

    @model_validator(mode="after")
    def _one_origin_of_prompts(self) -> RLStage:
        only_one(self, prompts="the name of a curate stage", task="a component")
        return self

    @model_validator(mode="before")
    @classmethod
    def _knows_its_noise(cls, value: Any) -> Any:
        """Where a calibrate stage has measured how noisy the rewards are, the advantage goes by that unless told."""
        if isinstance(value, dict) and value.get("weights_from") is not None and value.get("advantage") is None:
            return {**value, "advantage": "reliability-z"}
        return value

    @model_validator(mode="after")
    def _has_weights_to_follow(self) -> RLStage:
        if self.recalibrate is not None and self.weights_from is None:
            raise ValueError("'recalibrate' follows up what a calibrate stage found: name that stage in 'weights_from'")
        return self

    @model_validator(mode="after")
    def _has_time_to_learn(self) -> RLStage:
        leaves_warmup(self.optimizer, self.steps * self.updates_per_step)
        return self


class DistillStage(Settings):
    """On-policy distillation: a student learns its teachers' velocities where its own samples pass."""

    stage: Literal["distill"]
    adapter: Ref
    teachers: dict[str, str | dict[str, float]] = Field(
        min_length=1,
        description="Route (t2i, edit) -> stage that trained its teacher; or several with weights that sum to 1, of "
        "which each prompt asks one at a time, as often as its weight says. Without "
        "`prompts` they are those of the one asked most.",
    )
    prompts: dict[str, str] = Field(
        default_factory=dict, description="Route -> curate stage; what the teacher was trained on, when left out."
    )
    tasks: dict[str, Ref] = Field(
        default_factory=dict,
        description="Route -> task, whose train prompts are used in place of those: distillation needs no rewards, so "
        "any prompt will do.",
    )
    guidance: Ref = Ref(use="teacher-only")
    kernel: Ref = Ref(use="ode")
    solver: Ref | None = Field(None, description=SOLVER)
    timesteps: Ref = Ref(use="all")
    step_weight: StepWeight = Field("uniform", description=STEP_WEIGHT)
    distiller: Ref = Ref(use="velocity-match")
    plus: list[WeightedRef] = Field(default_factory=list, description=PLUS)
    anchor: str | None = Field(None, description=ANCHOR)
    sampling: Sampling = Sampling()
    optimizer: Optimizer = Optimizer()
    observers: list[Ref] = Field(default_factory=list)
    init: str = Field("base", description="The model to start from: `base` or a stage.")
    steps: Count = Field(100, description="Rounds of sampling and learning.")
    prompts_per_step: Count = Field(16, description="Prompts in a round.")
    updates_per_step: Count = Field(
        1, description="Optimiser steps on the states of a round, each on its prompts' share."
    )
    micro_batch: Count = Field(256, description="State points in one forward of an update.")
    checkpoint_every: Count = Field(
        1, description="Steps between checkpoints: how many a run that is cut off may have to repeat."
    )
    pictures_every: Count = Field(10, description="Steps between the pictures that show how the model changes.")
    keep_checkpoints: Count = Field(2, description="How many checkpoints to keep.")
    max_skipped: Whole = Field(10, description="Stop when more updates were skipped because they were not finite.")
    keep_every: Count | None = Field(None, description="Keep also those whose step is a multiple of this.")
    probe_prompts: Count = Field(32, description="Held-out prompts whose states measure progress.")
    probe_every: Count = Field(10, description="Steps between such measurements.")

    @field_validator("teachers", mode="before")
    @classmethod
    def _weighs_several(cls, value: Any) -> Any:
        for route, teacher in value.items() if isinstance(value, dict) else ():
            if isinstance(teacher, list):
                if len(teacher) < 2:
                    raise ValueError(f"{route!r} has a list of {len(teacher)} teacher(s). Write {route}: STAGE")
                equal = ", ".join(f"{name}: {1 / len(teacher):.3g}" for name in teacher)
                raise ValueError(
                    f"{route!r} has {len(teacher)} teachers without weights. Say how often each is asked, "
                    f"{route}: {{{equal}}}, or keep one of them"
                )
            if isinstance(teacher, dict):
                sums_to_one(f"the teachers of {route!r}", teacher)
        return value

    @property
    def mixtures(self) -> dict[str, dict[str, float]]:
        """Route -> stage of a teacher -> how often it is asked; a single one always."""
        return {
            route: {teacher: 1.0} if isinstance(teacher, str) else dict(teacher)
            for route, teacher in self.teachers.items()
        }

    @property
    def leading(self) -> dict[str, str]:
        """Route -> the teacher whose prompts are taken where none are named: of several, the one asked most."""
        return {route: max(mixture, key=lambda name: mixture[name]) for route, mixture in self.mixtures.items()}

    @property
    def weight_sets(self) -> dict[str, str]:
        """Name of a teacher's weight set, less `teacher/` -> stage: the route, of several with the stage."""
        return {
            route if len(mixture) == 1 else f"{route}/{name}": name
            for route, mixture in self.mixtures.items()
            for name in mixture
        }

    @model_validator(mode="after")
    def _has_time_to_learn(self) -> DistillStage:
        leaves_warmup(self.optimizer, self.steps * self.updates_per_step)
        share = self.prompts_per_step // max(1, len(self.teachers))
        if self.updates_per_step > max(1, share):
            raise ValueError(
                f"updates_per_step {self.updates_per_step} leaves nothing for some of them: a route has {share} "
                f"prompts a step. Take more prompts_per_step, or fewer updates"
            )
        return self

    @model_validator(mode="after")
    def _routes_have_teachers(self) -> DistillStage:
        for route in self.prompts:
            if route not in self.teachers:
                known = suggest(route, self.teachers)
                raise ValueError(f"'prompts' has a route {route!r}, for which 'teachers' names nobody.{known}")
        for route in self.tasks:
            if route not in self.teachers:
                known = suggest(route, self.teachers)
                raise ValueError(f"'tasks' has a route {route!r}, for which 'teachers' names nobody.{known}")
            if route in self.prompts:
                raise ValueError(f"route {route!r} has both 'prompts' and 'tasks'. Leave one of them out")
        return self


class SupervisedStage(Settings):
    """Learns from pictures: flow matching on what a task shows as the answer to its prompts."""

    stage: Literal["supervised"]
    adapter: Ref
    task: Ref
    objective: Ref = Ref(use="sft")
    optimizer: Optimizer = Optimizer()
    observers: list[Ref] = Field(default_factory=list)
    init: str = Field("base", description="The model to start from: `base` or a stage.")
    steps: Count = Field(1000, description="Optimiser steps.")
    batch: Count = Field(256, description="Pictures in a step.")
    points: Count = Field(
        1, description="Times and noises per picture and step; its prompt is read once for all of them."
    )
    ema: Share = Field(0.999, description="Decay of the averaged weights, which are the result; 0 averages nothing.")
    logit_mean: Real = Field(0.0, description="Times are drawn as sigmoid(normal(logit_mean, logit_std)).")
    logit_std: Positive = Field(1.0, description="See `logit_mean`.")
    drop_condition: Share = Field(0.1, description="Share of prompts replaced by the unconditional one.")
    checkpoint_every: Count = Field(
        100, description="Steps between checkpoints: how many a run that is cut off may have to repeat."
    )
    keep_checkpoints: Count = Field(2, description="How many checkpoints to keep.")
    max_skipped: Whole = Field(10, description="Stop when more updates were skipped because they were not finite.")
    keep_every: Count | None = Field(None, description="Keep also those whose step is a multiple of this.")

    @model_validator(mode="after")
    def _has_time_to_learn(self) -> SupervisedStage:
        leaves_warmup(self.optimizer, self.steps)
        return self


class EvaluateStage(Settings):
    """Compares models on the same held-out prompts and seeds."""

    stage: Literal["evaluate"]
    adapter: Ref
    models: list[str] = Field(min_length=1, description="Stages, or `base`.")
    baseline: str = Field("base", description="The model that the others are compared with.")
    tasks: dict[str, Ref] = Field(
        default_factory=dict,
        description="Route -> task; when left out, those of the recipe's distill, rl and curate stages, or else of its "
        "supervised ones.",
    )
    guidance: Ref = Ref(use="rollout-only")
    kernel: Ref = Ref(use="ode")
    sampling: Sampling = Sampling()
    evaluators: list[Ref] = Field(min_length=1)
    rewards: list[RewardRef] = Field(default_factory=list)
    seeds_per_prompt: Count = Field(4, description="Pictures per prompt and model.")
    max_prompts: Count | None = Field(None, description="Look at the first so many prompts only.")
    bootstrap: Count = Field(2000, description="Resamples for the intervals.")
    guide_folded: bool = Field(
        False,
        description="Also guide models that have guidance folded in, which compounds both: to see what that does.",
    )
    cross_task: bool = Field(False, description="Also judge each teacher on the tasks it was not trained on.")

    @model_validator(mode="after")
    def _measures_the_baseline(self) -> EvaluateStage:
        if self.baseline not in self.models:
            raise ValueError(
                f"'baseline' is {self.baseline!r}, which is not among 'models', so there would be nothing to compare "
                f"with. Add it to 'models', or make one of them the baseline: {', '.join(dict.fromkeys(self.models))}"
            )
        return self


class ExportStage(Settings):
    """Writes a model that stock libraries load."""

    stage: Literal["export"]
    model: str = Field(description="The stage whose model is exported.")
