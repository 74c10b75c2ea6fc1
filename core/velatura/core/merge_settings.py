"""What a recipe says of a stage that merges models. Data only; no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from velatura.core.base_settings import Ref, Settings
from velatura.core.learning_settings import sums_to_one


class MergeStage(Settings):
    """Makes one model of several that were trained from the same base, without training: for a cold start."""

    stage: Literal["merge"]
    adapter: Ref
    models: dict[str, float] = Field(min_length=2, description="Stage that trained a model -> its weight.")
    how: Literal["average", "add", "product"] = Field(
        "average",
        description="`average`: the weighted mean of the trained weights, weights summing to 1; `add`: the base and "
        "the weighted sum of what each training changed (task arithmetic); `product`: the same of the products B A of "
        "LoRA weights, cut to their rank again, where the others take the factors.",
    )

    @model_validator(mode="after")
    def _has_weights(self) -> MergeStage:
        if self.how == "average":
            sums_to_one("models", self.models)
        elif all(weight == 0 for weight in self.models.values()):
            raise ValueError("models: every weight is 0, which leaves the base. Give one of them another")
        return self
