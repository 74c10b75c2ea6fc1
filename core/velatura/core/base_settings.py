"""What every part of a recipe is made of: kinds of numbers, and names of components. Data only; no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Count = Annotated[int, Field(strict=True, ge=1)]
"""At least one of something; `true` and 2.5 are not counts."""


Whole = Annotated[int, Field(strict=True, ge=0)]


Real = Annotated[float, Field(strict=True)]


Positive = Annotated[float, Field(strict=True, gt=0)]


NotNegative = Annotated[float, Field(strict=True, ge=0)]


Share = Annotated[float, Field(strict=True, ge=0, le=1)]
"""A part of a whole, 0 to 1."""


Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""What is left of a running mean after a step; at 1 it would never move."""


class Settings(BaseModel):
    """A frozen part of a recipe, in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def only_one(settings: Settings, **meanings: str) -> None:
    """Refuse settings in which not exactly one of these fields is given; each with what it is."""
    given = [name for name in meanings if getattr(settings, name) is not None]
    if len(given) != 1:
        wanted = " or ".join(f"{name!r} ({meaning})" for name, meaning in meanings.items())
        raise ValueError(f"give {wanted}; {'both are given, leave one out' if given else 'neither is given'}")


class Ref(Settings):
    """Names a component and sets its options: `{use: nft, with: {beta: 1.0}}`, or only `nft`."""

    use: str = Field(min_length=1, description="Name of the component; of a plugin 'acme' it is 'acme/name'.")
    with_: dict[str, Any] = Field(default_factory=dict, alias="with", description="Options of the component.")

    @property
    def given(self) -> dict[str, Any]:
        """The options as they are checked before anything runs."""
        return self.with_

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """`nft` is `{use: nft}`; `with:` followed by nothing sets nothing."""
        if isinstance(value, str):
            return {"use": value}
        if isinstance(value, dict) and "with" in value and value["with"] is None:
            return {**value, "with": {}}
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """For editors: both forms."""
        return {"anyOf": [{"type": "string"}, handler.resolve_ref_schema(handler(schema))]}


class WeightedRef(Ref):
    """Names a component and says how much its loss counts: `{use: velocity-kl, weight: 0.01}`."""

    weight: NotNegative = Field(
        1.0, description="How much it counts beside the first one, which counts 1; at 0 it is left out."
    )
