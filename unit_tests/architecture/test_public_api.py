"""What is public is what `velatura.api` exports. Whoever changes this list changes what plugins may rely on."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
from pathlib import Path
from typing import Any

import velatura.api
from velatura.api import Component

SNAPSHOT = Path(__file__).with_name("public_api.json")
ADVICE = (
    "The public surface changed. Additions with a default are fine: write the file again with "
    "`python unit_tests/architecture/test_public_api.py`, and say so in CHANGELOG.md. What goes, or changes its "
    "meaning, has to be deprecated for a release first."
)


def surface() -> dict[str, Any]:
    """Every export: fields of data, members of enums, signatures of methods and class attributes of contracts."""
    return {name: described(getattr(velatura.api, name)) for name in sorted(velatura.api.__all__)}


def described(thing: Any) -> Any:
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        return [member.name for member in thing]
    if dataclasses.is_dataclass(thing):
        fields = {field.name: "required" if is_required(field) else "optional" for field in dataclasses.fields(thing)}
        return {"fields": fields, "methods": methods(thing)}
    if isinstance(thing, type) and issubclass(thing, Component):
        return {"abstract": sorted(thing.__abstractmethods__), "methods": methods(thing)}
    return {"methods": methods(thing)} if isinstance(thing, type) else type(thing).__name__


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def methods(thing: type) -> dict[str, list[str]]:
    """Names of the arguments of public methods that a class of ours defines, inherited ones too."""
    found = {}
    for name, value in inspect.getmembers(thing, inspect.isroutine):
        function = inspect.unwrap(getattr(value, "__func__", value))
        if not name.startswith("_") and getattr(function, "__module__", "").startswith("velatura."):
            found[name] = [parameter for parameter in inspect.signature(function).parameters if parameter != "cls"]
    return found


def test_the_public_surface_is_what_was_agreed_on() -> None:
    assert surface() == json.loads(SNAPSHOT.read_text()), ADVICE


def test_every_export_is_documented() -> None:
    assert [name for name in velatura.api.__all__ if not inspect.getdoc(getattr(velatura.api, name))] == []


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n")
