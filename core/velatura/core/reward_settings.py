"""What a recipe says of a reward: how much it counts, and how it is looked after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from velatura.core.base_settings import Count, NotNegative, Positive, Ref, Settings, Share

JUDGE = "judge"
"""Folder of a judge-fit stage in which its judge is."""


class Breaker(Settings):
    """When a reward that keeps failing is left alone, and for how long."""

    after: Count = Field(32, description="Failures in a row after which the reward is not asked.")
    cool_down: Positive = Field(30.0, description="Seconds until one picture is tried again.")


class Golden(Settings):
    """Pictures whose scores are known, by which a judge is checked at the start and now and then."""

    file: str = Field(
        description="JSONL file beside the recipe, a picture a line; docs/looking-after-rewards.md has its keys."
    )
    every: Count = Field(50, description="Steps (of a curate stage: batches of prompts) between two checks.")
    minutes: Positive | None = Field(
        None, description="Checks also at the end of a step when the latest was so long ago; null looks at no clock."
    )
    allowed: Share = Field(0.0, description="Largest share of the expectations that may be wrong.")
    max_drift: NotNegative | None = Field(
        None, description="Largest change of a picture's score since the check at the start; null allows any."
    )


class Recalibrate(Settings):
    """When weights that a calibrate stage found are looked at again, on the samples of the policy that is trained."""

    every: Count = Field(200, description="Optimiser steps after which weights are found anew, whatever has changed.")
    groups: Count = Field(200, description="The latest groups of a category that are measured.")
    drift: Share = Field(
        0.1, description="Before that, as soon as the share of a reward lies this far from what it was to be."
    )
    max_change: Annotated[float, Field(strict=True, gt=0, le=1)] = Field(
        0.1, description="Largest change of a weight at a time."
    )
    bootstrap: Annotated[int, Field(strict=True, ge=2)] = Field(
        200, description="Resamples for the standard errors; what changes by less than one is left alone."
    )


class RewardRef(Ref):
    """Names a reward and says how much it counts, and how it is looked after."""

    weight: NotNegative = Field(1.0, description="How much it counts in the composite and in the advantage.")
    weight_by_category: dict[str, NotNegative] = Field(
        default_factory=dict, description="Weight for prompts of a category, in place of `weight`."
    )
    name: str | None = Field(None, min_length=1, description="What reports call it; the component's name by default.")
    card: str | None = Field(
        None,
        min_length=1,
        exclude=True,  # nothing that a stage makes depends on it
        description="Its reward card: the folder or the file, seen from the recipe. See `velatura reward-card`.",
    )
    cache: bool | None = Field(
        None, description="Whether scores are kept in the run folder and used again; null: judges' are, others' not."
    )
    threads: Count | None = Field(None, description="CPU threads of its own; null takes as many as the run has.")
    breaker: Breaker = Field(Breaker(), description="When it is left alone because it keeps failing.")
    golden: Golden | None = Field(None, description="Checks the reward on pictures whose scores are known.")
    judge: str | None = Field(
        None, description="A judge-fit stage: the reward asks the judge that it made, its option `path`."
    )

    @model_validator(mode="after")
    def _asks_one_judge(self) -> RewardRef:
        if self.judge is not None and "path" in self.with_:
            raise ValueError(f"'judge' is stage {self.judge!r}, and 'path' names a judge, too. Leave one of them out")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """Options, and where in the run folder the judge of the stage is."""
        return self.with_ if self.judge is None else {**self.with_, "path": f"{self.judge}/{JUDGE}"}

    def opened(self, run_folder: Path) -> RewardRef:
        """The same with the path of the judge in a run."""
        if self.judge is None:
            return self
        path = str((run_folder / self.judge / JUDGE).absolute())
        return self.model_copy(update={"judge": None, "with_": {**self.with_, "path": path}})

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or self.use
