"""What a result depends on, by content: files, folders and rewards under names that do not say where a clone lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velatura.core.build import build
from velatura.core.recipe import Ref, content_hash
from velatura.core.registry import Registry

if TYPE_CHECKING:
    from velatura.core.components import RewardModel
    from velatura.core.types import Context

LONGEST_PATH, LONGEST_NAME = 1024, 255
"""Characters of a path, and bytes of a name in it, up to which a system can be asked whether it is there."""
_hashes: dict[tuple[str, int, int], str] = {}


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_hash(path: Path) -> str:
    """SHA-256 over a file, or over the names and contents of all files of a folder.

    A file of the same place, size and time of change is read once in a process: a judge's weights may be large.
    """
    if path.is_file():
        return _hash_once(path)
    found = sorted(file for file in path.rglob("*") if file.is_file() and ".git" not in file.parts)
    return content_hash([[file.relative_to(path).as_posix(), _hash_once(file)] for file in found])


def _hash_once(path: Path) -> str:
    facts = path.stat()
    key = (str(path.resolve()), facts.st_size, facts.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = file_hash(path)
    return _hashes[key]


def texts(value: Any) -> Iterator[str]:
    """Every string in nested options that could be a path."""
    if isinstance(value, str):
        if is_nameable(value):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts(item)


def is_nameable(text: str) -> bool:
    """Whether a file could have this path; longer ones are an error where one only asks for them."""
    names = text.split("/")
    return (
        0 < len(text) < LONGEST_PATH
        and not {"\n", "\0"} & set(text)
        and all(len(name.encode(errors="replace")) <= LONGEST_NAME for name in names)
    )


def pictures_hash(path: Path, base: Path) -> str:
    """SHA-256 over the files that the lines of a JSONL file name, seen from its folder or from `base`; empty where
    there are none. A line that is no JSON names none: whoever reads it says so."""
    found: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            try:
                named = set(texts(json.loads(line))) - found.keys()
            except (ValueError, RecursionError):
                continue
            for text in named:
                places = [folder / text for folder in (path.parent, base) if (folder / text).is_file()]
                if places:
                    found[text] = _hash_once(places[0])
    return content_hash(sorted(found.items())) if found else ""


def named_contents(given: Any, base: Path) -> dict[str, str]:
    """What options name on disk, seen from `base`: text of the option -> hash of the file or folder."""
    found = sorted({text for text in texts(given) if (base / text).exists() and text.strip("./\\")})
    return {text: files_hash(base / text) for text in found}


def reward_fingerprint(registry: Registry, ref: Ref, context: Context, model: RewardModel[Any] | None = None) -> str:
    """Changes whenever scores of two runs of this reward may not be compared.

    Of its name, the version of its package (for a plugin that is a file, its content), and what the component says of
    itself. `model` is the one that is set up, where there is one: then what it learnt of its server counts, too.
    """
    made: Any = model if model is not None else build(registry, "reward", ref)
    info = registry.info("reward", ref.use)
    plugin = Path(info.distribution)
    package = file_hash(plugin) if plugin.is_file() else info.version
    return content_hash([ref.use, package, made.fingerprint(context)])


def lasting_options(given: Mapping[str, Any], operational: Collection[str]) -> dict[str, Any]:
    """Options without those that say where and how fast a reward runs; one within another is named with dots."""
    kept = {}
    for name, value in given.items():
        inner = [own.removeprefix(f"{name}.") for own in operational if own.startswith(f"{name}.")]
        if name not in operational:
            kept[name] = lasting_options(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def options_fingerprint(component: Any, context: Context, ignore: Sequence[str] = ()) -> str:
    """Hash of a component's options, less its `operational` ones and those in `ignore`, with the content of the files
    that they name."""
    operational = (*getattr(component, "operational", ()), *ignore)
    given = lasting_options(component.options.model_dump(mode="json"), operational)
    return content_hash([component.name, given, list(named_contents(given, context.base).values())])
