"""The stages that make a judge."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from velatura.core.base_settings import Count, Positive, Ref, Settings, Share, Whole, only_one
from velatura.core.reward_settings import RewardRef
from velatura.core.settings import Optimizer, Sampling, leaves_warmup


class RaterRef(RewardRef):
    """Names a reward that rates pictures, and in which dimension."""

    dimension: str = Field(min_length=1, description="What it rates: alignment, aesthetics, ...")


class RateStage(Settings):
    """Draws pictures and has them rated: what a judge is fitted to, or measured against."""

    stage: Literal["rate"]
    adapter: Ref
    task: Ref
    guidance: Ref = Ref(use="rollout-only")
    kernel: Ref = Ref(use="ode")
    sampling: Sampling = Sampling()
    raters: list[RaterRef] = Field(
        min_length=1, description="Rewards whose scores are the ratings; several of one dimension are several raters."
    )
    truth: list[RaterRef] = Field(
        default_factory=list, description="Rewards that are known to be right, one a dimension; only measured against."
    )
    model: str = Field("base", description="Whose samples are rated.")
    group_size: Count = Field(8, description="Pictures per prompt.")
    max_prompts: Count | None = Field(None, description="Look at the first so many prompts only.")
    mismatched: Share = Field(
        0.0,
        description="Share of pictures that are rated for another prompt of their category, so that a judge of "
        "alignment sees what is plainly wrong. Edits are left alone.",
    )
    max_failed: Share = Field(0.05, description="Stop when a larger share of ratings failed.")

    @model_validator(mode="after")
    def _has_one_truth(self) -> RateStage:
        known = [ref.dimension for ref in self.truth]
        twice = [dimension for dimension in known if known.count(dimension) > 1]
        if twice:
            raise ValueError(f"'truth' has dimension {twice[0]!r} twice, and there is only one. Leave one of them out")
        return self


class JudgeFitStage(Settings):
    """Fine-tunes a judge on ratings; rewards ask it by the name of the stage."""

    stage: Literal["judge-fit"]
    judge_model: Ref
    dimension: str = Field(min_length=1, description="Which of the ratings it learns.")
    ratings: str | None = Field(None, description="Ratings: JSONL, seen from the recipe.")
    rated: str | None = Field(None, description="The rate stage that made the ratings, in place of `ratings`.")
    optimizer: Optimizer = Optimizer()
    observers: list[Ref] = Field(default_factory=list)
    steps: Count = Field(500, description="Optimiser steps.")
    batch: Count = Field(32, description="Pictures in a step.")
    micro_batch: Count = Field(32, description="Pictures in one forward of an update.")
    together: Count = Field(2, description="Pictures of one prompt that come in the same step, as far as there are.")
    validate_every: Count = Field(50, description="Steps between measurements on the calibration split.")
    train_share: Share = Field(0.6, description="Of the prompt clusters, to learn from.")
    calibration_share: Share = Field(
        0.2, description="Of the prompt clusters, to choose the best step on. What is left is the test split."
    )
    bootstrap: Whole = Field(2000, description="Resamples for the intervals.")
    checkpoint_every: Count = Field(
        50, description="Steps between checkpoints: how many a run that is cut off may have to repeat."
    )
    keep_checkpoints: Count = Field(2, description="How many checkpoints to keep.")
    max_skipped: Whole = Field(10, description="Stop when more updates were skipped because they were not finite.")
    keep_every: Count | None = Field(None, description="Keep also those whose step is a multiple of this.")
    marked_at_once: Count = Field(32, description="Pictures in one forward of a measurement.")
    near: Positive = Field(0.8, le=1, description="Jaccard index of 5-letter pieces above which texts are one cluster.")

    @model_validator(mode="after")
    def _is_complete(self) -> JudgeFitStage:
        only_one(self, ratings="a file", rated="the name of a rate stage")
        if self.train_share == 0 or self.calibration_share == 0 or self.train_share + self.calibration_share > 0.99:
            raise ValueError("each split needs a share: train_share and calibration_share above 0, together below 1")
        leaves_warmup(self.optimizer, self.steps)
        return self
