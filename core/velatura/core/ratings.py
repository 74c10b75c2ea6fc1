"""Rated pictures: a JSONL file, one object a line, and its splits by prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from velatura.core.errors import VelaturaError, suggest
from velatura.core.jsonl import parse_line
from velatura.core.types import Prompt, Sample

Finite = Annotated[float, Field(allow_inf_nan=False)]
LIKE = '{"image": "1.png", "prompt": "a red fox", "dimension": "alignment", "ratings": [4, 5]}'
"""A line that would do."""


class RatingLine(BaseModel):
    """One line of a ratings file: a picture, what was asked for, and what raters said of it in one dimension."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(min_length=1, description="The picture; paths are seen from the file.")
    prompt: str = Field(min_length=1, description="The prompt, or the edit instruction.")
    dimension: str = Field(min_length=1, description="What was rated: `alignment`, `aesthetics`, ...")
    ratings: tuple[Finite, ...] = Field(
        description="One number a rater, on the levels of the rubric; between two levels is allowed."
    )
    sources: tuple[str, ...] = Field((), description="Source images of an edit.")
    category: str = "general"
    rationale: str = Field("", description="Why: what the judge should write before its score.")
    cluster: str | None = Field(
        None, description="Lines of one cluster are never split; made from prompt and sources when left out."
    )
    truth: Finite | None = Field(
        None, description="What is known to be right, on any scale, where it is known; only measured against."
    )

    @field_validator("ratings")
    @classmethod
    def _somebody_rated(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("nobody has rated this picture. Rate it, or remove the line")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A picture with its ratings."""

    sample: Sample
    """Its prompt's id is the same for all pictures of that prompt and those sources."""
    ratings: tuple[float, ...]
    rationale: str = ""
    truth: float | None = None

    @property
    def mean(self) -> float:
        """Of the ratings."""
        return sum(self.ratings) / len(self.ratings)


class RatingFile:
    """Lines of one dimension of a ratings file; pictures are read when a line is looked at."""

    def __init__(self, path: Path, dimension: str, levels: Sequence[int]) -> None:
        """Raises `VelaturaError`, with the number of the first line that is wrong."""
        self.path, self.dimension = path, dimension
        lines = list(_parsed(path))
        self.numbers = [number for number, line in lines if line.dimension == dimension]
        self.lines = [line for _, line in lines if line.dimension == dimension]
        if not self.lines:
            known = sorted({line.dimension for _, line in lines})
            raise VelaturaError(f"{path}: no line rates {dimension!r}.{suggest(dimension, known)}")
        for number, line in zip(self.numbers, self.lines, strict=True):
            outside = [rating for rating in line.ratings if not levels[0] <= rating <= levels[-1]]
            if outside:
                raise VelaturaError(
                    f"{path}:{number}: a rating is {outside[0]:g}; the rubric has levels {levels[0]} to {levels[-1]}"
                )

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.lines)

    def rated(self, row: int) -> Rated:
        """One picture with its ratings."""
        line, folder = self.lines[row], self.path.parent
        prompt = Prompt(
            id=prompt_key(line),
            text=line.prompt,
            task="edit" if line.sources else "t2i",
            category=line.category,
            sources=tuple(read_image(folder / source) for source in line.sources),
        )
        sample = Sample(prompt=prompt, image=read_image(folder / line.image), seed=row)
        return Rated(sample=sample, ratings=line.ratings, rationale=line.rationale, truth=line.truth)


def prompt_key(line: RatingLine) -> str:
    """The same for pictures that answer the same request."""
    return hashlib.sha256(json.dumps([line.prompt, line.sources]).encode()).hexdigest()[:16]


def _parsed(path: Path) -> Iterator[tuple[int, RatingLine]]:
    """Each line that is not blank, with its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        names = [found.name for found in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        hint = suggest(path.name, names) if names else " Paths start at the folder of the recipe."
        raise VelaturaError(f"there is no ratings file {str(path)!r}.{hint}") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise VelaturaError(f"{path}: a ratings file is a text file in UTF-8, one JSON object a line") from error
    found = 0
    for number, raw in enumerate(text.split("\n"), start=1):
        if raw.strip():
            found += 1
            line = parse_line(f"{path}:{number}", raw, RatingLine, LIKE)
            for image in (line.image, *line.sources):
                if not (path.parent / image).is_file():
                    raise VelaturaError(f"{path}:{number}: there is no image {image!r} in {path.parent}")
            yield number, line
    if not found:
        raise VelaturaError(f"{path}: there are no ratings in it; write lines like {LIKE}")


def read_image(path: Path) -> Tensor:
    """An image file as RGB in [0, 1], `3 H W`."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float32)
    except UnidentifiedImageError as error:
        raise VelaturaError(f"{path} is not an image that Pillow can read") from error
    except (OSError, SyntaxError) as error:  # Pillow's words for a file that ends early, or is broken inside
        raise VelaturaError(f"the image {path} cannot be read: {error}. Put a whole file in its place.") from error
    return torch.from_numpy(pixels / 255.0).permute(2, 0, 1).contiguous()


def line_of(rated: Mapping[str, Any]) -> str:
    """One line of a ratings file."""
    return json.dumps(rated, ensure_ascii=False, allow_nan=False)
