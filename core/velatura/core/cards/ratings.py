"""What people said of pictures: a JSONL file, one object a line, in which every mistake is told with its line."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from velatura.core.base_settings import Settings
from velatura.core.errors import VelaturaError, suggest
from velatura.core.jsonl import wrong_in

Choice = Literal["a", "b", "tie"]
SIDE: Mapping[str, float] = {"a": 1.0, "b": -1.0, "tie": 0.0}
WITHIN = "within-policy"
"""Pairs of one policy and one prompt, other seeds: the pairs that training compares."""
SHOWN = 10
"""Mistakes that are told at once."""
HELD = 4
"""Of the clusters without a split, one in so many calibrates."""


class RatingLine(Settings):
    """One line: a picture with ratings, or two pictures with choices."""

    prompt: str = Field(min_length=1, description="The prompt, or the edit instruction.")
    image: str | None = Field(None, description="The picture that was rated; a path, seen from the file.")
    images: tuple[str, str] | None = Field(None, description="In its place the two pictures, a and b, of a pair.")
    sources: tuple[str, ...] = Field((), description="Source pictures of an edit.")
    ratings: dict[str, Annotated[float, Field(ge=1, le=5)]] = Field(
        default_factory=dict, description="Rater -> 1 to 5, higher is better."
    )
    choices: dict[str, Choice] = Field(default_factory=dict, description="Rater -> a, b or tie.")
    rater: str | None = Field(None, description="With `rating` or `choice`: one rater on a line of its own.")
    rating: Annotated[float, Field(ge=1, le=5)] | None = None
    choice: Choice | None = None
    category: str = "general"
    stratum: str | None = Field(
        None, description="Of a pair: within-policy, across-checkpoints, cross-model, degraded."
    )
    model: str | None = Field(None, description="Which model drew the picture; ratings of one model make pairs.")
    cluster: str | None = Field(None, description="What is not independent of each other; the prompt when left out.")
    split: Literal["train", "calibration", "test"] | None = Field(
        None, description="`train` is left out of the card; when left out, one cluster in four calibrates."
    )
    prompt_id: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict, description="For the reward, and for slices.")

    @model_validator(mode="after")
    def _is_a_rating_or_a_choice(self) -> Self:
        if (self.image is None) == (self.images is None):
            raise ValueError("give either 'image' with ratings or 'images', two of them, with choices")
        own, other = ("choices", "ratings") if self.images else ("ratings", "choices")
        if getattr(self, other) or getattr(self, other[:-1]) is not None:
            what = "two pictures are compared" if self.images else "one picture is rated"
            raise ValueError(f"{what}, so '{other}' do not belong here; write '{own}'")
        alone = getattr(self, own[:-1])
        if (alone is None) != (self.rater is None):
            raise ValueError(f"'{own[:-1]}' and 'rater' belong together")
        if not getattr(self, own) and alone is None:
            raise ValueError(f"nobody said anything: '{own}' is empty")
        if self.rater is not None and self.rater in getattr(self, own):
            raise ValueError(f"rater {self.rater!r} is named twice")
        return self

    @property
    def key(self) -> str:
        """What makes two lines speak of the same prompt."""
        return self.prompt_id or json.dumps([self.prompt, *self.sources])

    @property
    def said(self) -> dict[str, float]:
        """Rater -> rating, or 1 for a, -1 for b, 0 for a tie."""
        if self.images is None:
            alone = {self.rater: self.rating} if self.rater is not None and self.rating is not None else {}
            return {**self.ratings, **alone}
        known = {**self.choices, **({self.rater: self.choice} if self.rater and self.choice else {})}
        return {rater: SIDE[choice] for rater, choice in known.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a prompt."""

    key: str
    text: str
    sources: tuple[Path, ...]
    category: str
    cluster: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedPicture:
    """One picture of one prompt."""

    facts: Facts
    path: Path
    model: str = ""
    ratings: dict[str, float] = field(default_factory=dict)
    """Rater -> 1 to 5; empty for pictures that were only compared."""

    @property
    def mean(self) -> float:
        """Mean rating; NaN without any."""
        return math.fsum(self.ratings.values()) / len(self.ratings) if self.ratings else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedPair:
    """Two pictures of one prompt that people chose between."""

    first: int
    """Row in `Rated.pictures`."""
    second: int
    stratum: str
    choices: dict[str, float]
    """Rater -> 1 the first, -1 the second, 0 a tie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A file of ratings."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    lines: int
    pictures: tuple[RatedPicture, ...]
    pairs: tuple[RatedPair, ...]
    """Those of the file; where there are only ratings, two pictures of a prompt make a pair."""
    split: Mapping[str, str]
    """Cluster -> calibration or test."""
    left_out: int
    """Lines of the split `train`."""

    @property
    def raters(self) -> list[str]:
        """Everybody who said something."""
        said = [p.ratings for p in self.pictures] + [p.choices for p in self.pairs]
        return sorted({rater for answers in said for rater in answers})

    def split_of(self, picture: int) -> str:
        """`calibration` or `test`."""
        return self.split[self.pictures[picture].facts.cluster]


def read_ratings(path: Path) -> Rated:
    """All that a file says.

    Raises:
        VelaturaError: it is missing, holds nothing, or lines of it are wrong; the first ten are named.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        names = [found.name for found in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise VelaturaError(f"there is no file of ratings {str(path)!r}.{suggest(path.name, names)}") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise VelaturaError(f"{path}: ratings are a text file in UTF-8, one JSON object a line") from error
    lines, wrong = [], []
    for number, raw in enumerate(text.split("\n"), start=1):
        if raw.strip():
            line, found = _line(raw, path.parent)
            wrong += [f"{path}:{number}: {message}" for message in found]
            lines += [(number, line)] if line is not None else []
    if wrong:
        more = f"\nand {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise VelaturaError("\n".join(wrong[:SHOWN]) + more)
    if not lines:
        raise VelaturaError(f"{path}: nothing is rated; write lines like {LIKE}")
    return _assembled(path, hashlib.sha256(content).hexdigest(), lines)


LIKE = '{"prompt": "a red fox", "images": ["a.png", "b.png"], "choices": {"ann": "a", "ben": "tie"}}'


def _line(raw: str, folder: Path) -> tuple[RatingLine | None, list[str]]:
    """A line, or what is wrong with it."""
    line = wrong_in(raw, RatingLine, LIKE)
    if isinstance(line, list):
        return None, line
    files = [*line.sources, *(line.images or ()), *([line.image] if line.image else [])]
    missing = [f"there is no picture {name!r} in {folder}" for name in files if not (folder / name).is_file()]
    return (None, missing) if missing else (line, [])


class _Gathering:
    """Lines become pictures and pairs, each once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pictures: list[RatedPicture] = []
        self.rows: dict[tuple[str, Path], int] = {}
        self.pairs: dict[tuple[int, int], RatedPair] = {}
        self.splits: dict[str, tuple[str, int]] = {}
        self.left_out = 0

    def add(self, number: int, line: RatingLine) -> None:
        """One line.

        Raises:
            VelaturaError: it contradicts an earlier one.
        """
        cluster = line.cluster or line.key
        if line.split is not None:
            known, where = self.splits.setdefault(cluster, (line.split, number))
            if known != line.split:
                raise self._wrong(number, f"cluster {cluster!r} is in split {line.split!r} here and in {known!r} on "
                                  f"line {where}; what belongs together must not be measured apart")  # fmt: skip
        if line.split == "train":
            self.left_out += 1
            return
        if line.images is None:
            row = self._picture(line, str(line.image), cluster)
            self._say(number, self.pictures[row].ratings, line.said)
            return
        first, second = (self._picture(line, name, cluster) for name in line.images)
        if first == second:
            raise self._wrong(number, f"both pictures are {line.images[0]!r}")
        turned = (second, first) in self.pairs
        key = (second, first) if turned else (first, second)
        pair = self.pairs.setdefault(
            key, RatedPair(first=key[0], second=key[1], stratum=line.stratum or WITHIN, choices={})
        )
        said = {rater: -value if turned else value for rater, value in line.said.items()}
        self._say(number, pair.choices, said)

    def _picture(self, line: RatingLine, name: str, cluster: str) -> int:
        key = (line.key, self.path.parent / name)
        if key not in self.rows:
            facts = Facts(
                key=line.key, text=line.prompt, sources=tuple(self.path.parent / source for source in line.sources),
                category=line.category, cluster=cluster, metadata=line.metadata,
            )  # fmt: skip
            self.rows[key] = len(self.pictures)
            self.pictures.append(RatedPicture(facts=facts, path=key[1], model=line.model or ""))
        return self.rows[key]

    def _say(self, number: int, known: dict[str, float], said: Mapping[str, float]) -> None:
        for rater, value in said.items():
            if rater in known:
                raise self._wrong(number, f"rater {rater!r} has answered this before; one answer a rater counts")
            known[rater] = value

    def _wrong(self, number: int, message: str) -> VelaturaError:
        return VelaturaError(f"{self.path}:{number}: {message}")


def _assembled(path: Path, digest: str, lines: Sequence[tuple[int, RatingLine]]) -> Rated:
    gathering = _Gathering(path)
    for number, line in lines:
        gathering.add(number, line)
    pictures = tuple(gathering.pictures)
    if not pictures:
        raise VelaturaError(
            f"{path}: all {len(lines)} lines are of the split 'train', so nothing is left to measure on"
        )
    pairs = tuple(gathering.pairs.values()) or tuple(_made_of_ratings(pictures))
    clusters = dict.fromkeys(picture.facts.cluster for picture in pictures)
    split = {name: gathering.splits[name][0] if name in gathering.splits else _drawn(name) for name in clusters}
    return Rated(
        path=path, digest=digest, lines=len(lines), pictures=pictures, pairs=pairs, split=split,
        left_out=gathering.left_out,
    )  # fmt: skip


def _drawn(cluster: str) -> str:
    """Calibration for one cluster in four, by the hash of its name: the same in every card."""
    return "calibration" if hashlib.sha256(cluster.encode()).digest()[0] % HELD == 0 else "test"


def _made_of_ratings(pictures: Sequence[RatedPicture]) -> Iterator[RatedPair]:
    """Every two pictures of a prompt that a rater has rated both: the higher rating is the choice."""
    groups: dict[str, list[int]] = {}
    for row, picture in enumerate(pictures):
        groups.setdefault(picture.facts.key, []).append(row)
    for rows in groups.values():
        for place, first in enumerate(rows):
            for second in rows[place + 1 :]:
                a, b = pictures[first], pictures[second]
                both = sorted(a.ratings.keys() & b.ratings.keys())
                choices = {r: float((a.ratings[r] > b.ratings[r]) - (a.ratings[r] < b.ratings[r])) for r in both}
                if choices:
                    stratum = WITHIN if a.model == b.model else "cross-model"
                    yield RatedPair(first=first, second=second, stratum=stratum, choices=choices)
