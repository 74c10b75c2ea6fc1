"""What can be set on a component. Imports no torch."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

from velatura.core.deprecation import Renamed, with_new_names


class Options(BaseModel):
    """Options of a component: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[tuple[Renamed, ...]] = ()
    """Options that have another name now: recipes with the old one go on to work until a release."""

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, given: Any, info: ValidationInfo) -> Any:
        """Exchange old names for new ones; the context, if there is one, is the place in the recipe."""
        owner = info.context if isinstance(info.context, str) else cls.__name__
        return with_new_names(given, cls.renamed, owner) if cls.renamed else given


class NoOptions(Options):
    """For components that have nothing to set."""
