"""What pydantic complains about, in the words of this project: the nearest known key, and the value it got."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from velatura.core.errors import suggest

Location = tuple[int | str, ...]


def complaints(
    error: ValidationError, model: type[BaseModel], noun: str, language: str = "YAML"
) -> Iterator[tuple[Location, str]]:
    """Each complaint as (where, what), with `noun` ("option", "key") for what an unknown name should have been.

    `language`: what the user wrote, YAML or JSON, in whose words values and remedies are told.

    Unknown names come first, as they explain what is missing. The place is a path through the data: the tags that
    pydantic puts in for the members of a union are left out.
    """
    details = error.errors(include_url=False)
    for detail in sorted(details, key=lambda detail: detail["type"] != "extra_forbidden"):
        places = _walk(model, detail["loc"])
        location = tuple(part for part, _ in places if part != "[key]")
        if detail["type"] == "union_tag_invalid":
            location = (*location, "stage")
        yield location, _describe(detail, places, model, noun, language)


def _describe(
    detail: ErrorDetails, places: list[tuple[int | str, Any]], model: type[BaseModel], noun: str, language: str
) -> str:
    """One complaint in words."""
    expected = places[-1][1] if places else model
    if detail["type"] == "extra_forbidden":
        parent = places[-2][1] if len(places) > 1 else model
        known = keys(parent)
        if not known:
            return f"no such {noun}: there is none to set"
        hint = suggest(str(detail["loc"][-1]), known)
        slot = {"use", "with"} <= set(known) and hint.startswith(" There is")
        return f"no such {noun}.{hint}{' Options of the component stand in ' + repr('with') + '.' if slot else ''}"
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], int):
        return f"the list ends too early: item {detail['loc'][-1] + 1} is missing"
    if detail["type"] == "missing":
        parent = places[-2][1] if len(places) > 1 else model
        return f"this {noun} is missing{_meaning(parent, detail['loc'][-1])}"
    if detail["type"] == "union_tag_invalid":
        given = str(detail["ctx"]["tag"])
        return f"no stage is of kind {given!r}.{suggest(given, _tags(expected))}"
    if detail["type"] == "union_tag_not_found":
        return f"'stage' is missing; it says of what kind the stage is: {', '.join(_tags(expected))}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    wanted = _wanted(detail, WANTED if language == "YAML" else WANTED | IN_JSON)
    return f"{wanted} (got {_got(detail['input'], language)}){_near_value(detail, expected)}"


WANTED = {
    "model_type": "this is one component: write its name, or {{use: NAME, with: {{OPTION: VALUE}}}}",
    "dict_type": "this is a mapping: write {{NAME: VALUE}}",
    "list_type": "this is a list: write [...], also for a single item",
    "int_type": "give a whole number",
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "float_parsing": "give a number",
    "finite_number": "give a finite number",
    "bool_type": "give true or false",
    "bool_parsing": "give true or false",
    "string_type": "give text, in quotes where YAML would read it as something else",
    "greater_than": "give more than {gt:g}",
    "greater_than_equal": "give {ge:g} or more",
    "less_than": "give less than {lt:g}",
    "less_than_equal": "give {le:g} or less",
    "literal_error": "give {expected}",
    "too_short": "give at least {min_length}",
    "too_long": "give at most {max_length}",
    "string_too_short": "give text with a length of at least {min_length}",
    "string_too_long": "give text with a length of at most {max_length}",
    "tuple_type": "this is a list: write [...], also for a single item",
}
"""Type of a complaint -> what should stand there, in the words of somebody who writes YAML; else pydantic's words."""
IN_JSON = {
    "dict_type": 'this is an object: write {{"NAME": VALUE}}',
    "string_type": 'give text in double quotes, like "so"',
}
"""What is written otherwise in JSON."""


def _wanted(detail: ErrorDetails, words: Mapping[str, str]) -> str:
    """What should stand there."""
    context = detail.get("ctx", {})
    settings = detail["type"] == "model_type" and "Ref" not in str(context.get("class_name", ""))
    wanted = words.get("dict_type" if settings else detail["type"])
    return detail["msg"] if wanted is None else wanted.format(**context)


def _got(value: object, language: str = "YAML") -> str:
    """A value as it stands in the file."""
    if language == "JSON":
        return (
            json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, bool) else reprlib.repr(value)
        )
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true, as YAML reads yes and on" if value else "false, as YAML reads no and off"
    return reprlib.repr(value)


def _near_value(detail: ErrorDetails, expected: Any) -> str:
    """The nearest of the words that may stand there."""
    if detail["type"] != "literal_error":
        return ""
    words = [str(w) for member in _members(expected) if get_origin(member) is Literal for w in get_args(member)]
    near = get_close_matches(str(detail["input"]), words, n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def _meaning(annotation: Any, name: int | str) -> str:
    """What a field that has to be given is for."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            for field_name, field in member.model_fields.items():
                if name in (field_name, field.alias) and field.description:
                    return f": {field.description}"
    return ""


def _tags(annotation: Any) -> list[str]:
    """The kinds that a discriminated union knows."""
    return [tag for member in _members(annotation) for tag in _tag(member)]


def _walk(annotation: Any, location: Location) -> list[tuple[int | str, Any]]:
    """The parts of a location that are places in the data, each with the type expected there: of a union, the member
    whose tag follows."""
    places: list[tuple[int | str, Any]] = []
    for part in location:
        members = [member for member in _members(annotation) if part in _tag(member)]
        annotation = members[0] if members else _step(annotation, part)
        if members and places:
            places[-1] = (places[-1][0], annotation)
        elif not members:
            places.append((part, annotation))
    return places


def _step(annotation: Any, part: int | str) -> Any:
    """The type expected at `part` of a value of type `annotation`; Any where nothing is known."""
    for member in _members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if isinstance(member, type) and issubclass(member, BaseModel):
            for name, field in member.model_fields.items():
                if part in (name, field.alias):
                    return field.annotation
        elif isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
            return arguments[1]
        elif origin is not None and isinstance(part, int) and arguments:
            return arguments[0]
    return Any


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union, looked for through `Annotated`; the type itself where it is none."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _tag(member: Any) -> tuple[Any, ...]:
    """How a discriminated union names this member in locations."""
    if not (isinstance(member, type) and issubclass(member, BaseModel)) or "stage" not in member.model_fields:
        return ()
    annotation = member.model_fields["stage"].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def keys(annotation: Any) -> list[str]:
    """The keys that a value of this type may have."""
    models = [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
    return [field.alias or name for model in models for name, field in model.model_fields.items()]
