"""A judge's health: pictures whose scores, or whose order, are known and do not change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from loguru import logger
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from velatura.core.asking import Asker, joined, scopes
from velatura.core.errors import RewardError, VelaturaError
from velatura.core.jsonl import parse_line
from velatura.core.reward_settings import Golden
from velatura.core.types import Prompt, Sample, Status

LIKE = '{"image": "fox.png", "prompt": "a red fox", "low": 0.8}'
"""A line of a golden set."""
TOLD = 3
"""How many wrong expectations a message names."""


class Line(BaseModel):
    """A picture of a golden set, and what is known of its score."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(description="File of the picture, seen from the golden set.")
    prompt: str = Field(description="What was asked for; of an edit the instruction.")
    sources: list[str] = Field(default_factory=list, description="Files of the pictures to edit.")
    task: str = Field("t2i", description="Route.")
    category: str = Field("general", description="Category of the prompt.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="What the reward reads besides.")
    low: float | None = Field(None, description="Least score that is right.")
    high: float | None = Field(None, description="Largest score that is right.")
    order: str | None = Field(None, description="Name of the pictures that this one is compared with.")
    place: int | None = Field(None, ge=1, description="Its place there, 1 the best; equal places are not compared.")

    @model_validator(mode="after")
    def _expects_something(self) -> Self:
        if (self.order is None) != (self.place is None):
            raise ValueError("'order' and 'place' go together")
        if self.low is None and self.high is None and self.order is None:
            raise ValueError("nothing is expected of it: give low, high, or order and place")
        return self


@dataclass(slots=True)
class GoldenSet:
    """Golden pictures of one reward, and its scores at the first check."""

    path: Path
    settings: Golden
    lines: tuple[Line, ...]
    samples: tuple[Sample, ...]
    _first: Tensor | None = field(default=None)

    def is_due(self, reports: int, seconds: float) -> bool:
        """Whether to check after so many reports of the judge, and so long after its latest check."""
        minutes = self.settings.minutes
        return reports % self.settings.every == 0 or (minutes is not None and seconds >= 60 * minutes)

    @classmethod
    def load(cls, settings: Golden, base: Path) -> Self:
        """Read lines and pictures.

        Raises:
            VelaturaError: the file or a picture is missing or broken, or nothing is expected; with the line.
        """
        path = (base / settings.file).resolve()
        try:
            rows = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            said = f"there is no golden set at {path} ({error}). `golden.file` starts at the recipe."
            raise VelaturaError(said) from error
        lines = [
            (number, parse_line(f"{path}:{number}", row, Line, LIKE))
            for number, row in enumerate(rows, start=1)
            if row.strip()
        ]
        if not lines:
            raise VelaturaError(f"the golden set {path} is empty. Give it a picture a line, or leave `golden` out.")
        groups = {name: g for g, name in enumerate(dict.fromkeys(line.order for _, line in lines if line.order))}
        samples = [_sample(line, number, groups, path) for number, line in lines]
        return cls(path=path, settings=settings, lines=tuple(line for _, line in lines), samples=tuple(samples))

    def check(self, at: str, asker: Asker) -> float:
        """Share of the expectations that hold; scores are made anew, whatever is known from before.

        Raises:
            RewardError: too few do.
        """
        rows = list(range(len(self.samples)))
        parts = scopes(asker.model, self.samples, rows)
        scores = joined([asker.fresh([self.samples[i] for i in part]) for part in parts])
        places = {i: j for j, i in enumerate(i for part in parts for i in part)}
        values = torch.tensor([
            float(scores.values[places[i]]) if scores.status[places[i]] is Status.OK else math.nan for i in rows
        ])  # fmt: skip
        why = {i: f"{scores.status[places[i]].name.lower()}: {_at(scores.reasons, places[i])}" for i in rows}
        held, wrong = self._compare(values, why)
        if not held and not wrong:
            logger.warning("reward '{}' gave no golden picture a score, so its health is not known", asker.label)
            return math.nan
        self._require(at, asker.label, held, wrong)
        self._require_steady(at, asker.label, values)
        self._first = values if self._first is None else self._first
        total = held + len(wrong)
        logger.info("reward '{}': {} of {} expectations of {} hold", asker.label, held, total, self.path.name)
        return held / total

    def _compare(self, values: Tensor, why: Mapping[int, str]) -> tuple[int, list[str]]:
        """How many expectations hold, and what the others say. At the first check every picture needs a score; later
        one without says nothing of the judge's mind: the failure budget counts it."""
        said: list[str] = []
        total = 0
        for i, line in enumerate(self.lines):
            if (line.low is None and line.high is None) or self._is_silent(values, i):
                continue
            total += 1
            low, high = (-math.inf if line.low is None else line.low), (math.inf if line.high is None else line.high)
            value = float(values[i])
            if not low <= value <= high:
                got = why[i] if math.isnan(value) else f"{value:.4g}"
                said.append(f"{line.image}: {got}, expected {low:g} to {high:g}")
        for i, j in self._pairs():
            if self._is_silent(values, i, j):
                continue
            total += 1
            if not float(values[i]) > float(values[j]):
                one, other = (why[k] if math.isnan(float(values[k])) else f"{float(values[k]):.4g}" for k in (i, j))
                said.append(f"{self.lines[i].image} ({one}) is not above {self.lines[j].image} ({other})")
        return total - len(said), said

    def _pairs(self) -> list[tuple[int, int]]:
        """Rows of which the first must score higher."""
        ranked = [(line.order, line.place) for line in self.lines]
        return [
            (i, j)
            for i, (order, place) in enumerate(ranked)
            for j, (other, below) in enumerate(ranked)
            if order is not None and order == other and place is not None and below is not None and place < below
        ]

    def _require(self, at: str, label: str, held: int, wrong: Sequence[str]) -> None:
        total = held + len(wrong)
        if len(wrong) > self.settings.allowed * total:
            told = "; ".join(wrong[:TOLD]) + ("; ..." if len(wrong) > TOLD else "")
            raise RewardError(
                f"{at}: reward '{label}' fails its golden set {self.path}: {len(wrong)} of {total} expectations are "
                f"wrong, and `golden.allowed` is {self.settings.allowed:g}. {told}. Is it the judge that it should be? "
                f"Mend it, or the set, and start again: finished stages and checkpoints are kept."
            )

    def _is_silent(self, values: Tensor, *rows: int) -> bool:
        """Whether, after the first check, one of these pictures has no score."""
        return self._first is not None and bool(values[list(rows)].isnan().any())

    def _require_steady(self, at: str, label: str, values: Tensor) -> None:
        if self._first is None or self.settings.max_drift is None:
            return
        moved = (values - self._first).abs().nan_to_num(nan=0.0)
        row = int(moved.argmax())
        if float(moved[row]) > self.settings.max_drift:
            raise RewardError(
                f"{at}: reward '{label}' scores {self.lines[row].image} with {float(values[row]):.4g}, and at the "
                f"start with {float(self._first[row]):.4g}: more than `golden.max_drift` {self.settings.max_drift:g} "
                f"apart. Somebody changed the judge under the run. Bring it back and start again: finished stages and "
                f"checkpoints are kept."
            )


def _at(reasons: Sequence[str], row: int) -> str:
    return reasons[row] if reasons else ""


def _sample(line: Line, number: int, groups: Mapping[str, int], path: Path) -> Sample:
    """A picture of an order has that order's group; others are alone."""
    group = groups[line.order] if line.order is not None else len(groups) + number
    prompt = Prompt(
        id=f"golden/{number}", text=line.prompt, task=line.task, category=line.category, metadata=line.metadata,
        sources=tuple(_picture(path.parent / name, f"{path}:{number}") for name in line.sources),
    )  # fmt: skip
    return Sample(prompt=prompt, image=_picture(path.parent / line.image, f"{path}:{number}"), seed=number, group=group)


def _picture(path: Path, at: str) -> Tensor:
    """`3 H W` in [0, 1]."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise VelaturaError(f"{at}: there is no picture at {path} ({error})") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255).contiguous()
