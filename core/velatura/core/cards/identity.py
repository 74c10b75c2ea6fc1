"""Which reward a card is about: everything that its scores depend on, by name, so that a change can be told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from velatura.core.base_settings import Ref
from velatura.core.build import build
from velatura.core.components import RewardModel
from velatura.core.fingerprint import file_hash, is_nameable, lasting_options
from velatura.core.recipe import content_hash
from velatura.core.registry import Registry

READ = 2**20
"""Bytes of a file in a model folder up to which its content counts; of larger ones the name and the size."""


def identity_of(registry: Registry, ref: Ref, base: Path) -> dict[str, str]:
    """Name -> value: component, version, every option that changes what it says, and what the reward adds (a rubric's
    content). Of files and folders that options name, however deep, the content counts, not the place."""
    model = build(registry, "reward", ref)
    if not isinstance(model, RewardModel):
        raise TypeError(f"{ref.use} is no reward")
    info = registry.info("reward", ref.use)
    given = lasting_options(model.options.model_dump(mode="json"), model.operational)
    parts = {"component": ref.use, "version": info.version or file_hash(Path(info.distribution))[:16]}
    for name, value in _leaves(given):
        content = _content(base, value)
        parts[f"option {name}"] = f"{Path(value).name} ({content})" if content else _written(value)
    return {**parts, **model.identity()}


def digest_of(identity: Mapping[str, str]) -> str:
    """One short name for all of it."""
    return content_hash(dict(identity))[:16]


def differences(card: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not as it was, in words."""
    said = []
    for name in sorted({*card, *now}):
        before, after = card.get(name), now.get(name)
        if before != after:
            said.append(f"{name} was {before or 'not set'} and is {after or 'not set'}")
    return said


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name -> value of options within options; lists count from 1, and what is empty stays as it is."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value, 1) if isinstance(value, list) else ()
    if not inner or not value:
        yield name, value
        return
    for key, item in inner:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _written(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _content(base: Path, value: Any) -> str:
    """A digest of the file or folder that an option names; empty where it names none."""
    if not isinstance(value, str) or not is_nameable(value):
        return ""
    path = base / value
    if path.is_file():
        return file_hash(path)[:16]
    return _folder(path) if path.is_dir() else ""


def _folder(path: Path) -> str:
    """Names and sizes of all files of a model folder, and the content of the small ones: weights are not read."""
    digest = hashlib.sha256()
    for file in sorted(found for found in path.rglob("*") if found.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}:".encode())
        if size <= READ:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
