"""Lines of the JSONL files that people write: an object each, and every mistake in the words that recipes use."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from velatura.core.errors import RecipeError
from velatura.core.explain import complaints

Line = TypeVar("Line", bound=BaseModel)


def wrong_in(raw: str, model: type[Line], like: str) -> Line | list[str]:
    """The line as a `model`, or everything that is wrong with it: the key, what it should be, what it is.

    `like`: a line that would do.
    """
    try:
        data: Any = json.loads(raw)
    except ValueError as error:
        where = f": {error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else f" ({error})"
        return [f"this is not JSON{where}. Write a line like {like}"]
    if not isinstance(data, dict):
        return [f"this is {KINDS.get(type(data), 'a number')}, not an object. Write a line like {like}"]
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = complaints(error, model, "key", language="JSON")
        return [": ".join([*(".".join(map(str, place)),) * bool(place), said]) for place, said in found]


def parse_line(at: str, raw: str, model: type[Line], like: str, more: str = "") -> Line:
    """The line as a `model`. `at`: its place, like `prompts.jsonl:3`; `more`: said after an unknown key.

    Raises:
        RecipeError: with the place, and all that is wrong.
    """
    found = wrong_in(raw, model, like)
    if isinstance(found, list):
        said = [f"{text} {more}" if more and ": no such key" in text else text for text in found]
        raise RecipeError("\n".join(f"{at}: {text}" for text in said))
    return found


KINDS = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
"""What stands in a line in place of an object; otherwise a number."""
