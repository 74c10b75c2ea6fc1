"""Checks of every component, whatever its kind."""

from __future__ import annotations

import json
import pickle
import re
from typing import Any

from pydantic import BaseModel

from velatura.core.components import NoOptions
from velatura.testing.kit import NotChecked, Subject, check, require

KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@check()
def name_is_lower_case_words_joined_by_dashes(subject: Subject) -> None:
    """Recipes, metrics and folders carry it."""
    name = subject.component.name
    require(KEBAB.fullmatch(name), f"{name!r} is not lower-case words joined by '-', like 'high-noise'")


@check()
def class_is_documented(subject: Subject) -> None:
    """`velatura plugins list` and `show` print it."""
    own = (subject.component.__dict__.get("__doc__") or "").strip()
    require(own, f"class {subject.component.__name__} has no docstring; its first line is what `plugins list` prints")


@check()
def every_option_is_described(subject: Subject) -> None:
    """`velatura plugins show` and editors print descriptions."""
    fields = subject.component.options_class.model_fields
    bare = [name for name, field in fields.items() if not field.description]
    require(not bare, f"no description: {', '.join(bare)}; write Field(default, description='...')")


@check()
def options_refuse_what_they_do_not_know(subject: Subject) -> None:
    """A misspelt option must not be taken for its default; options are part of what a run is and do not change."""
    config = subject.component.options_class.model_config
    require(config.get("extra") == "forbid", "its options accept unknown keys; keep extra='forbid'")
    require(config.get("frozen"), "its options can be changed after they are made; keep frozen=True")


@check()
def options_survive_a_round_trip(subject: Subject) -> None:
    """A run folder keeps them as text, and goes on from it."""
    options = _options(subject)
    written = json.dumps(options.model_dump(mode="json", by_alias=True))
    read = type(options).model_validate(json.loads(written))
    require(read == options, f"options {options!r} are {read!r} after they were written to JSON and read again")


@check()
def it_can_be_pickled_before_setup(subject: Subject) -> None:
    """It may be made in one process and used in another; what is heavy or open is made in `setup`."""
    made = subject.unready()
    try:
        copy = pickle.loads(pickle.dumps(made))
    except Exception as error:
        require(False, f"it cannot be pickled before `setup`: {type(error).__name__}: {error}")
        return
    require(copy.options == made.options, "its options are others after pickling")


def _options(subject: Subject) -> BaseModel:
    options: Any = subject.unready().options
    if isinstance(options, NoOptions):
        raise NotChecked("it has no options")
    return options  # type: ignore[no-any-return]
