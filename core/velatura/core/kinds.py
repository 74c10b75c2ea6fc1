"""Every kind of stage that a recipe may have."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from velatura.core.calibrate_settings import CalibrateStage
from velatura.core.judge_settings import JudgeFitStage, RateStage
from velatura.core.merge_settings import MergeStage
from velatura.core.settings import (
    CurateStage,
    DistillStage,
    EvaluateStage,
    ExportStage,
    RLStage,
    SupervisedStage,
)

Stage = Annotated[
    CurateStage
    | CalibrateStage
    | RLStage
    | DistillStage
    | SupervisedStage
    | MergeStage
    | RateStage
    | JudgeFitStage
    | EvaluateStage
    | ExportStage,
    Field(discriminator="stage"),
]
