"""JSON Schema of a recipe with the components that are installed: what editors complete and validate by."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from velatura.core.errors import PluginError
from velatura.core.recipe import SLOTS
from velatura.core.registry import ComponentInfo, Registry

Schema = dict[str, Any]
REFERENCES = ("Ref", "RewardRef", "RaterRef")
"""Definitions of what may stand in a slot."""
FOUND_ELSEWHERE = {"reward": ("path",)}
"""Kind -> options that a recipe may leave out although they are required: `judge: STAGE` sets the path."""
NOTHING: Schema = {"type": "null"}


def with_components(schema: Schema, registry: Registry) -> Schema:
    """The schema of a recipe in which a slot takes the components of its kind, each with its own options.

    Names of plugins that are not installed are let through: a recipe may name a plugin file. Imports everything.
    """
    found = copy.deepcopy(schema)
    definitions: Schema = found["$defs"]
    offered = _offered(registry)
    places = [found, *(definitions[name] for name in list(definitions))]
    for place in places:
        for slot, value in place.get("properties", {}).items():
            if slot in SLOTS:
                place["properties"][slot] = _specialised(value, SLOTS[slot])
    for reference in REFERENCES:
        for kind in sorted(set(SLOTS.values())):
            if reference in definitions:
                definitions[_key(reference, kind)] = _slot(definitions[reference], kind, offered.get(kind, []))
    for kind, infos in offered.items():
        for info in infos:
            definitions |= _options(registry, kind, info)
    found["properties"]["stages"] |= {"additionalProperties": _stage(found["properties"]["stages"])}
    precise: Schema = _precise(found)
    return _used(precise)


def _offered(registry: Registry) -> dict[str, list[ComponentInfo]]:
    """Kind -> components that can be used."""
    found: dict[str, list[ComponentInfo]] = {}
    for info in registry.list():
        if not info.problem:
            found.setdefault(info.kind, []).append(info)
    return found


def _key(*parts: str) -> str:
    """Name of a definition, fit for a pointer."""
    return ".".join(parts).replace("/", ".")


def _specialised(value: Any, kind: str) -> Any:
    """The same with every reference to a slot of any kind replaced by one to a slot of this kind."""
    if isinstance(value, dict):
        pointer = value.get("$ref", "")
        name = pointer.removeprefix("#/$defs/")
        if pointer and name in REFERENCES:
            return {**value, "$ref": f"#/$defs/{_key(name, kind)}"}
        return {key: _specialised(item, kind) for key, item in value.items()}
    return [_specialised(item, kind) for item in value] if isinstance(value, list) else value


def _slot(reference: Schema, kind: str, infos: list[ComponentInfo]) -> Schema:
    """What may stand in a slot of one kind: a name, or a name with options."""
    found = copy.deepcopy(reference)
    names = _names(infos)
    _, long = found["anyOf"]
    del found["anyOf"]
    found |= {"if": {"type": "object"}, "then": long, "else": names}
    long["properties"]["use"] = names | {"description": long["properties"]["use"].get("description", "")}
    long["properties"]["with"] = {"description": "Options of the component.", "type": ["object", "null"]}
    long["allOf"] = [
        {
            "if": {"properties": {"use": {"enum": _spellings(info)}}, "required": ["use"]},
            "then": {"properties": {"with": {"anyOf": [{"$ref": _pointer(kind, info)}, NOTHING]}}},
        }
        for info in infos
    ]
    return found


def _stage(stages: Schema) -> Schema:
    """What a stage may be, by its kind: a complaint about one kind says nothing of the others."""
    mapping: dict[str, str] = stages["additionalProperties"]["discriminator"]["mapping"]
    return {
        "type": "object",
        "required": ["stage"],
        "properties": {"stage": {"enum": list(mapping), "description": "Of what kind the stage is."}},
        "allOf": [
            {"if": {"properties": {"stage": {"const": kind}}, "required": ["stage"]}, "then": {"$ref": pointer}}
            for kind, pointer in mapping.items()
        ],
    }


def _precise(value: Any) -> Any:
    """The same with "this or nothing" such that what is wrong within "this" is complained of where it stands.

    Of alternatives a validator only says that none of them fits. The alternatives stay for what is neither a mapping
    nor a list, which an editor completes by them.
    """
    if isinstance(value, list):
        return [_precise(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _precise(item) for key, item in value.items()}
    this = [one for one in found.get("anyOf", ()) if one != NOTHING]
    if (
        len(this) == 1
        and len(found["anyOf"]) == 2
        and ("$ref" in this[0] or this[0].get("type") in ("array", "object"))
    ):
        either = found.pop("anyOf")
        found |= {"if": {"type": ["array", "object"]}, "then": this[0], "else": {"anyOf": either}}
    return found


def _names(infos: list[ComponentInfo]) -> Schema:
    """Names that are installed, each with its sentence, and those of other plugins."""
    known = [{"const": name, "description": info.summary} for info in infos for name in _spellings(info)]
    plugins = sorted({info.plugin for info in infos if "/" in info.name})
    other = "".join(f"(?!{re.escape(plugin)}/)" for plugin in plugins)
    return {"type": "string", "anyOf": [*known, {"pattern": f"^{other}[^/]+/[^/]+$"}]}


def _spellings(info: ComponentInfo) -> list[str]:
    """How a recipe may name it: components of plugin files without the plugin's name, too."""
    is_file = "/" in info.name and Path(info.distribution).suffix == ".py"
    return [info.name, info.name.partition("/")[2]] if is_file else [info.name]


def _pointer(kind: str, info: ComponentInfo) -> str:
    return f"#/$defs/{_key('options', kind, info.name)}"


def _options(registry: Registry, kind: str, info: ComponentInfo) -> Schema:
    """Definitions of the options of one component; of one that does not import, anything goes."""
    key = _key("options", kind, info.name)
    try:
        options = registry.get(kind, info.name).options_class
    except PluginError as error:
        return {key: {"type": "object", "description": str(error)}}
    schema = options.model_json_schema(by_alias=True, ref_template=f"#/$defs/{key}.{{model}}")
    inner: Schema = schema.pop("$defs", {})
    old = [change.old for change in options.renamed]
    schema.setdefault("properties", {}).update(
        {name: {"deprecated": True, "description": "Has another name now."} for name in old}
    )
    gone = {*FOUND_ELSEWHERE.get(kind, ()), *(change.new for change in options.renamed)}
    schema["required"] = [name for name in schema.get("required", []) if name not in gone]
    return {key: schema, **{f"{key}.{name}": definition for name, definition in inner.items()}}


def _used(schema: Schema) -> Schema:
    """Without definitions to which nothing points."""
    definitions = schema["$defs"]
    reached: set[str] = set()
    waiting = list(_pointers({key: value for key, value in schema.items() if key != "$defs"}))
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += _pointers(definitions[name])
    schema["$defs"] = {name: definition for name, definition in definitions.items() if name in reached}
    return schema


def _pointers(value: Any) -> Iterator[str]:
    """Names of the definitions that something points to."""
    if isinstance(value, dict):
        pointer = value.get("$ref")
        if isinstance(pointer, str):
            yield pointer.removeprefix("#/$defs/")
        discriminator = value.get("discriminator")
        if isinstance(discriminator, dict):
            yield from (str(p).removeprefix("#/$defs/") for p in discriminator.get("mapping", {}).values())
        for item in value.values():
            yield from _pointers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _pointers(item)
