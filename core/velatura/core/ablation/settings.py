"""What an ablation file may say. Data only; no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from velatura.core.base_settings import Settings, Whole
from velatura.core.errors import RecipeError, prefixed, suggest
from velatura.core.explain import complaints
from velatura.core.graph import BASE
from velatura.core.recipe import Recipe, load_recipe
from velatura.core.source import Source, read


class Arm(Settings):
    """One variant."""

    model: str | None = Field(None, description="The stage whose model stands for this arm; the file's when left out.")
    set: dict[str, Any] = Field(
        default_factory=dict, description="What is different: path in the recipe -> value, as on the command line."
    )


class Expectation(Settings):
    """One prediction of the claim: a metric is higher in one arm than in another."""

    metric: str = Field(min_length=1, description="Column of the evaluation, like gold/alignment.")
    more: str = Field(min_length=1, description="The arm said to have more of it.")
    than: str = Field(min_length=1, description="The arm said to have less; or `base`, the model all start from.")
    route: str | None = Field(None, description="Route of the evaluation; when left out its only one.")
    category: str | None = Field(None, description="Only prompts of this category.")


class Ablation(Settings):
    """A question put to a recipe: variants, seeds, and what the claim predicts."""

    question: str = Field(min_length=1)
    claim: str = Field(min_length=1, description="What is said to be so, in a sentence.")
    source: str = Field(min_length=1, description="Who says it, and where.")
    recipe: str = Field(min_length=1, description="The recipe all arms are variants of, relative to this file.")
    set: dict[str, Any] = Field(default_factory=dict, description="Set in every arm.")
    seeds: list[Whole] = Field(default=[0, 1, 2], min_length=1, description="Every arm is trained once with each.")
    evaluation: str = Field(min_length=1, description="The evaluate stage of the recipe that measures them.")
    model: str | None = Field(None, description="The stage whose model is compared, where arms name no other.")
    arms: dict[str, Arm] = Field(min_length=1)
    metrics: list[str] = Field(min_length=1, description="Columns of the evaluation in the figure.")
    expect: list[Expectation] = Field(min_length=1, description="The claim holds when all of these do.")
    not_testable: str | None = Field(None, description="Why this world cannot decide the claim, where it cannot.")

    @field_validator("seeds")
    @classmethod
    def _are_different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"a seed stands there twice: {value}. The same training again tells nothing new")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Ablation:
        for name, arm in self.arms.items():
            if name == BASE or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"an arm cannot be called {name!r}; it is a folder, and 'base' is what all start from")
            if arm.model is None and self.model is None:
                raise ValueError(f"arm {name!r} has no 'model', and there is none above for all arms")
        for index, expectation in enumerate(self.expect):
            if expectation.more == expectation.than:
                raise ValueError(f"expect.{index}: {expectation.more!r} is compared with itself. Name two arms")
            for key in ("more", "than"):
                arm_name = getattr(expectation, key)
                if arm_name not in (*self.arms, BASE):
                    hint = suggest(arm_name, [*self.arms, BASE])
                    raise ValueError(f"expect.{index}.{key}: no arm is called {arm_name!r}.{hint}")
        return self

    def model_of(self, arm: str) -> str:
        """The stage whose model stands for an arm."""
        return BASE if arm == BASE else str(self.arms[arm].model or self.model)

    def overrides(self, arm: str) -> list[str]:
        """What is set in an arm, as `velatura run` takes it."""
        given = {**self.set, **self.arms[arm].set}
        return [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in given.items()]


def load_ablation(path: Path) -> Ablation:
    """Read an ablation file and the recipe of each of its arms.

    Raises:
        RecipeError: with the file, the line and the path of what is wrong.
    """
    source = read(path, "ablation file")
    try:
        ablation = Ablation.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError("\n".join(dict.fromkeys(
            prefixed(source.at(place), message) for place, message in complaints(error, Ablation, "key")
        ))) from error  # fmt: skip
    for arm in ablation.arms:
        _check_arm(ablation, source, path, arm)
    return ablation


def recipe_path(ablation: Ablation, path: Path) -> Path:
    """The recipe behind an ablation file."""
    return (path.parent / ablation.recipe).resolve()


def _check_arm(ablation: Ablation, source: Source, path: Path, arm: str) -> None:
    """An arm's recipe can be read, and evaluates its model."""
    place = source.at(("arms", arm))
    try:
        recipe: Recipe = load_recipe(recipe_path(ablation, path), ablation.overrides(arm))
        stage: Any = recipe.stage(ablation.evaluation)
    except RecipeError as error:
        raise RecipeError(prefixed(place, str(error))) from error
    if stage.stage != "evaluate":
        message = f"'evaluation' names '{ablation.evaluation}', which is of kind {stage.stage}, not evaluate"
        raise RecipeError(prefixed(place, message))
    model = ablation.model_of(arm)
    if model not in stage.models:
        hint = suggest(model, stage.models)
        raise RecipeError(prefixed(place, f"'{ablation.evaluation}' does not measure the model '{model}'.{hint}"))
