"""Conditionings on disk: a prompt is encoded once, whatever runs, stages and processes ask for it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from velatura.api import Prompt

FORMAT = "1"
"""Raised when an encoded row would come out differently for the same key."""
HASHED = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
"""Files that a part is made of: weights, configurations, vocabularies, templates of chats."""


class ConditioningCache:
    """A folder of safetensors files, one per encoded row, named by the hash of everything the row depends on."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made on disk before the first row."""
        self.folder = folder

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The row of `key` on the CPU in the type it was encoded in; None where there is none that can be read."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError:  # cut off, by a full disk for instance: encoded again, and then replaced
            return None

    def put(self, key: str, row: Mapping[str, Tensor]) -> None:
        """Keep a row; readers see all of it or nothing."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in row.items()}, temporary)
        temporary.replace(path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def row_key(prompt: Prompt, text: str, depends: Mapping[str, Any]) -> str:
    """The hash of what a row depends on: the text, the pixels of the sources, and `depends` (JSON)."""
    digest = hashlib.sha256(json.dumps([FORMAT, text, depends], sort_keys=True).encode())
    for source in prompt.sources:
        digest.update(str(tuple(source.shape)).encode())
        digest.update(source.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _content_hash(path: Path) -> str:
    """SHA-256 of a file; the hub's cache names large ones by it."""
    name = path.resolve().name
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name):
        return name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(folder: Path, memory: Path) -> str:
    """SHA-256 over the weights and configurations in `folder`; remembered in `memory` as long as no file changes."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in HASHED)
    facts = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    stamp = hashlib.sha256(json.dumps([str(folder.resolve()), facts]).encode()).hexdigest()
    known = memory / f"{stamp}.sha256"
    if known.is_file():
        return known.read_text()
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)} {_content_hash(path)}".encode())
    memory.mkdir(parents=True, exist_ok=True)
    temporary = known.with_name(f".{known.name}.{os.getpid()}")
    temporary.write_text(digest.hexdigest())
    temporary.replace(known)
    return digest.hexdigest()
