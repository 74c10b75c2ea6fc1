"""What a result depends on, by content: files, folders and rewards under names that do not say where a clone lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velatura.core.build import build
from velatura.core.recipe import Ref, content_hash
from velatura.core.registry import Registry

if TYPE_CHECKING:
    from velatura.core.components import RewardModel
    from velatura.core.types import Context

LONGEST_PATH = 1024
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
    if isinstance(value, str) and 0 < len(value) < LONGEST_PATH and "\n" not in value:
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from texts(item)


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


def options_fingerprint(component: Any, context: Context, ignore: Sequence[str] = ()) -> str:
    """Hash of a component's options, less those in `ignore`, with the content of the files that they name."""
    given = component.options.model_dump(mode="json", exclude=set(ignore))
    return content_hash([component.name, given, list(named_contents(given, context.base).values())])
