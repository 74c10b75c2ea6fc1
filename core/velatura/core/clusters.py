"""Splits by prompt: what is nearly the same text, or has the same source picture, is never on both sides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from velatura.core.ratings import RatingLine

PIECE = 5
"""Letters of a piece of text."""
BANDS, ROWS = 24, 4
"""Of the MinHash signature: two texts of Jaccard index .8 share a band with probability 1 - (1 - .8^4)^24 > .999997."""
_PRIME = (1 << 31) - 1
"""Products of two numbers below it fit into 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Which lines belong to which split."""

    clusters: tuple[str, ...]
    """[n] the cluster of each line."""
    train: tuple[int, ...]
    calibration: tuple[int, ...]
    test: tuple[int, ...]

    def digests(self) -> Mapping[str, str]:
        """A hash of the clusters of each split: equal for equal splits."""
        parts = {"train": self.train, "calibration": self.calibration, "test": self.test}
        return {
            name: hashlib.sha256("\n".join(sorted({self.clusters[row] for row in rows})).encode()).hexdigest()[:16]
            for name, rows in parts.items()
        }


def split_lines(lines: Sequence[RatingLine], folder: Path, *, near: float, train: float, calibration: float) -> Splits:
    """Split by cluster: `train` and `calibration` are shares of the clusters, what is left is the test split.

    Where a cluster goes is a function of its first text (in order of the alphabet), so it stays there when other lines
    come and go.
    """
    clusters = clusters_of(lines, folder, near)
    rows: dict[str, list[int]] = {"train": [], "calibration": [], "test": []}
    for row, cluster in enumerate(clusters):
        place = int(cluster, 16) / 16 ** len(cluster)
        name = "train" if place < train else "calibration" if place < train + calibration else "test"
        rows[name].append(row)
    return Splits(clusters=tuple(clusters), **{name: tuple(own) for name, own in rows.items()})


def clusters_of(lines: Sequence[RatingLine], folder: Path, near: float) -> list[str]:
    """[n] a hash for each line: equal for near-duplicate texts, equal source pictures, and equal `cluster` fields."""
    texts = [normalised(line.prompt) for line in lines]
    distinct = sorted(set(texts))
    place = {text: number for number, text in enumerate(distinct)}
    parent = list(range(len(distinct)))
    first: dict[str, int] = {}
    ties = [(place[text], mark) for text, line in zip(texts, lines, strict=True) for mark in _marks(line, folder)]
    for own, mark in ties:
        _join(parent, own, first.setdefault(mark, own))
    for a, b in near_duplicates(distinct, near):
        _join(parent, a, b)
    return [hashlib.sha256(distinct[_root(parent, place[text])].encode()).hexdigest()[:16] for text in texts]


def normalised(text: str) -> str:
    """Lower case, single blanks, no punctuation."""
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())


def near_duplicates(texts: Sequence[str], near: float) -> list[tuple[int, int]]:
    """Pairs of distinct texts whose sets of five-letter pieces have a Jaccard index of `near` or more.

    Candidates come from MinHash bands (Broder 1997), and each is checked exactly.
    """
    pieces = [_pieces(text) for text in texts]
    draw = np.random.default_rng(20250505)
    factors, shifts = (draw.integers(1, _PRIME, BANDS * ROWS, dtype=np.uint64) for _ in range(2))
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for number, own in enumerate(pieces):
        hashes = np.array([_hash(piece) for piece in sorted(own)], dtype=np.uint64)
        least = ((hashes[:, None] * factors + shifts) % np.uint64(_PRIME)).min(0).reshape(BANDS, ROWS)
        for band, key in enumerate(least):
            buckets.setdefault((band, key.tobytes()), []).append(number)
    candidates = {(a, b) for own in buckets.values() for b in own for a in own if a < b}
    return sorted((a, b) for a, b in candidates if _jaccard(pieces[a], pieces[b]) >= near)


def _pieces(text: str) -> frozenset[str]:
    return frozenset(text[i : i + PIECE] for i in range(max(1, len(text) - PIECE + 1)))


def _hash(piece: str) -> int:
    """Below the prime."""
    return int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest(), "big") % _PRIME


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def _marks(line: RatingLine, folder: Path) -> list[str]:
    """What ties a line to others beside its text."""
    marks = [f"cluster {line.cluster}"] if line.cluster is not None else []
    return marks + [f"source {hashlib.sha256((folder / source).read_bytes()).hexdigest()}" for source in line.sources]


def _root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _join(parent: list[int], a: int, b: int) -> None:
    """The smaller root stays, whatever the order of joins."""
    low, high = sorted((_root(parent, a), _root(parent, b)))
    parent[high] = low
