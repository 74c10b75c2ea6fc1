"""Scores on disk, by content: the same picture for the same prompt is not judged twice by the same judge."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from velatura.core.fingerprint import files_hash, texts
from velatura.core.recipe import content_hash
from velatura.core.types import Sample, Scores, Status

FILE = "scores.sqlite"
PATIENCE = 60.0
"""Seconds to wait for another process that writes."""
AT_ONCE = 500
"""Keys in one question to the data base."""
CREATE = "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, value REAL NOT NULL, note TEXT NOT NULL)"


class NoKey(Exception):
    """Something that a reward may read has no content to take a key from."""


@dataclass(slots=True)
class ScoreCache:
    """Scores of one reward, in a file that several rewards and processes share.

    The key is a hash of: the reward's fingerprint (component, version, options, content of its files), the picture's
    pixels, text, route, category, size and metadata of the prompt with the content of files that they name, as masks,
    pixels of its sources in their order, and, for rewards that compare, the pictures of the group in their order. Only
    valid scores are kept. A file that cannot be read or written is warned of once, and scores are made as if there
    were none.
    """

    path: Path
    fingerprint: str
    base: Path | None = None
    """Folder that files in metadata are seen from; None looks for none."""
    _broken: bool = field(default=False)

    def keys(self, samples: Sequence[Sample], scope: str, repeat: int = 0) -> list[str | None]:
        """[B] keys; None for what cannot be recognised again. `repeat` tells passes over the same pictures apart."""
        contents = [_content(sample, self.base) for sample in samples]
        group = contents if scope == "group" else []
        if None in group:
            return [None] * len(samples)
        return [None if own is None else content_hash([self.fingerprint, repeat, own, group]) for own in contents]

    def find(self, keys: Sequence[str | None]) -> dict[int, tuple[float, str]]:
        """Row -> score and note, of those that are known."""
        wanted = {key: i for i, key in enumerate(keys) if key is not None}
        known = self._asked(list(wanted)) if wanted else {}
        return {i: known[key] for i, key in enumerate(keys) if key is not None and key in known}

    def keep(self, keys: Sequence[str | None], scores: Scores) -> None:
        """Remember the valid ones."""
        values, notes = scores.values.tolist(), scores.notes or ("",) * len(scores.status)
        rows = [
            (key, value, note)
            for key, value, note, status in zip(keys, values, notes, scores.status, strict=True)
            if key is not None and status is Status.OK
        ]
        if rows and not self._broken:
            try:
                with closing(self._open()) as base, base:
                    base.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)

    def _asked(self, keys: Sequence[str]) -> dict[str, tuple[float, str]]:
        found: dict[str, tuple[float, str]] = {}
        if self._broken:
            return found
        try:
            with closing(self._open()) as base:
                for start in range(0, len(keys), AT_ONCE):
                    part = keys[start : start + AT_ONCE]
                    marks = ",".join("?" * len(part))
                    rows = base.execute(f"SELECT key, value, note FROM scores WHERE key IN ({marks})", part)
                    found |= {key: (value, note) for key, value, note in rows}
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
        return found

    def _open(self) -> sqlite3.Connection:
        """A connection of this call: none is shared between threads or inherited by a process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(self.path, timeout=PATIENCE)
        base.execute(CREATE)
        return base

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        logger.warning("{} cannot be used ({}), so scores are made anew. Remove it if it is broken.", self.path, error)


def _content(sample: Sample, base: Path | None) -> str | None:
    """Hash of all that a reward may read of a sample; None where something has no content that can be named."""
    prompt = sample.prompt
    files = _named_files(prompt.metadata, base) if base is not None else {}
    try:
        return content_hash([
            _plain(sample.image), prompt.id, prompt.text, prompt.task, prompt.category, _plain(prompt.size),
            _plain(prompt.sources), _plain(prompt.target), _plain(prompt.metadata), *([files] if files else []),
        ])  # fmt: skip
    except NoKey:
        return None


def _named_files(metadata: Mapping[str, Any], base: Path) -> dict[str, str]:
    """Text -> hash of the file that it names, seen from `base`."""
    return {text: files_hash(base / text) for text in sorted(set(texts(metadata))) if (base / text).is_file()}


def _plain(value: Any) -> Any:
    """As data that has one spelling; tensors as a hash of their shape and bytes."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous()
        digest = hashlib.sha256(raw.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return ["tensor", str(raw.dtype), list(raw.shape), digest]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise NoKey
        return {"mapping": {key: _plain(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_plain(item) for item in value]]
    if isinstance(value, Enum):
        return ["enum", type(value).__qualname__, value.name]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__qualname__, {part.name: _plain(getattr(value, part.name)) for part in fields(value)}]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise NoKey
