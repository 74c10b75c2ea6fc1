"""A recipe's text as plain data that remembers on which line each value was written, and `a.b.c=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from velatura.core.errors import RecipeError, suggest
from velatura.core.shipped import shipped_recipes

Key = int | str
Location = tuple[Key, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, and 1e-4 is a number (to PyYAML it is a word)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(slots=True, kw_only=True)
class Source:
    """Plain data, and where each of its values comes from."""

    name: str
    """The file, as messages call it."""
    data: dict[str, Any]
    """What the file says, with overrides applied."""
    lines: dict[Location, int] = field(default_factory=dict)
    """1-based line of each key."""
    overridden: set[Location] = field(default_factory=set)
    """What the command line set."""

    def at(self, location: Location) -> str:
        """`recipe.yaml:12: stages.a.steps`, with the line of the nearest thing that was written."""
        path = ".".join(str(part) for part in location)
        where = self._where(location)
        return f"{where}: {path}" if path else where

    def _where(self, location: Location) -> str:
        for length in range(len(location), 0, -1):
            start = location[:length]
            if start in self.overridden:
                return "command line"
            if start in self.lines:
                return f"{self.name}:{self.lines[start]}"
            if length == len(location) and self.has(start):
                return "command line"
        return self.name

    def has(self, location: Location) -> bool:
        """Whether somebody wrote this value, or a part of it, in the file or on the command line."""
        return location in self.lines or any(place[: len(location)] == location for place in self.overridden)


def read(path: Path, what: str = "recipe") -> Source:
    """The file as data; `what` it is, for messages.

    Raises:
        RecipeError: with the line for text that is not YAML and for a key written twice.
    """
    text = _text(path, what)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        places = list(_places(root, str(path), set())) if root is not None else []
        data = _unshared(loader.construct_document(root), str(path)) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        begun = error.context_mark.line + 1 if error.context_mark else line
        inside = f", in what begins on line {begun}" if begun != line else ""
        raise RecipeError(f"{path}:{line}: this is not YAML: {_problem(error)}{inside}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: this is not YAML: {error}") from error
    if not isinstance(data, dict):
        key = " with the key 'stages'" if what == "recipe" else ""
        raise RecipeError(f"{path}: {with_article(what)} is a mapping{key}, this is a {type(data).__name__}")
    return Source(name=str(path), data=data, lines=dict(places))


def _problem(error: yaml.MarkedYAMLError) -> str:
    """What YAML's reader stumbled over."""
    said = str(error.problem or error.context)
    return "a tab stands before a word; indent with spaces" if r"'\t'" in said else said


def _unshared(value: Any, name: str, above: tuple[int, ...] = ()) -> Any:
    """A copy in which an alias has parts of its own, so that an override of one place changes one place."""
    if id(value) in above:
        raise RecipeError(f"{name}: an anchor stands inside of what it names")
    if isinstance(value, dict):
        return {key: _unshared(item, name, (*above, id(value))) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item, name, (*above, id(value))) for item in value]
    return value


def with_article(what: str) -> str:
    """`a recipe`, `an ablation file`."""
    return f"a{'n' * (what[0] in 'aeiou')} {what}"


def _text(path: Path, what: str) -> str:
    """The text of the file, or what to do when there is none."""
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; give a {what.removesuffix(' file')} file.{_recipes_like('', path)}")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"there is no {what} {str(path)!r}.{_recipes_like(path.name, path.parent, what)}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: this is not a text file in UTF-8") from error


def _recipes_like(name: str, folder: Path, what: str = "recipe") -> str:
    """The files of a folder, and the recipes that ship where the name of one is given, as a suggestion."""
    names = [found.name for found in folder.glob("*.y*ml")]
    if name and what == "recipe":
        names += [found.stem for found in shipped_recipes()]
    return suggest(name, names) if names else ""


def _places(node: yaml.Node, name: str, seen: set[int], location: Location = ()) -> Iterator[tuple[Location, int]]:
    """Every place in a document with its line; a key that is written twice is an error that names both lines."""
    if id(node) in seen:  # an alias: its lines are those of the anchor
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*location, index), item.start_mark.line + 1
            yield from _places(item, name, seen, (*location, index))
    elif isinstance(node, yaml.MappingNode):
        written: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in written:
                path = ".".join(str(part) for part in (*location, key.value))
                raise RecipeError(f"{name}:{line}: {path} is written twice, first on line {written[key.value]}")
            written[key.value] = line
            yield (*location, key.value), line
            yield from _places(value, name, seen, (*location, key.value))


def parse_override(text: str) -> tuple[Location, Any]:
    """`a.0.b=value` as a path and a value; the value is read as YAML."""
    path, equals, value = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"command line: {text!r} is not an override; write path.to.field=value, like seed=1")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"command line: the value of {text!r} is not YAML") from error
    return tuple(int(part) if part.isdecimal() else part for part in parts), parsed


REFERENCE_KEYS = ("use", "with", "weight", "weight_by_category", "name")
"""Keys of a reference: naming one of them turns the short form `slot: name` into `slot: {use: name}`."""


def assign(source: Source, path: Location, value: Any) -> None:
    """Set one value of the data. Mappings on the way are made; items of lists must exist."""
    container: Any = source.data
    for depth, part in enumerate(path[:-1]):
        key = _key(container, part, path[:depth])
        inner = container.get(key) if isinstance(container, dict) else container[key]
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and path[depth + 1] in REFERENCE_KEYS:
            inner = {"use": inner}
        container[key] = inner
        container = inner
    container[_key(container, path[-1], path[:-1])] = value
    source.overridden.add(path)


def _key(container: Any, part: Key, location: Location) -> Key:
    """`part` as a key of this container."""
    here = ".".join(str(p) for p in location)
    if isinstance(container, dict):
        return part if part in container else str(part)
    if not isinstance(container, list):
        raise RecipeError(f"command line: {here} is {container!r}; it has no part {str(part)!r}")
    if not isinstance(part, int) or part >= len(container):
        raise RecipeError(f"command line: {here} is a list of {len(container)}; it has no item {str(part)!r}")
    return part
