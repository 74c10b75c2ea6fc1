"""The task `tinyworld`: prompts of the embedded world, drawn one at a time when asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, overload

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from velatura.api import Options, Prompt, Task
from velatura.plugins.tinyworld.grammar import (
    EDIT_CATEGORIES,
    OPTIONAL_CATEGORIES,
    T2I_CATEGORIES,
    Split,
    draw_edit,
    wishes,
)
from velatura.plugins.tinyworld.render import Picture, render
from velatura.plugins.tinyworld.scenes import METADATA_KEY, Request


class TinyWorldOptions(Options):
    """Which prompts, and how many."""

    task: Literal["t2i", "edit", "both"] = Field("t2i", description="Text-to-image, edits, or both in turns.")
    count: int = Field(
        512, ge=1, description="How many train prompts; they are drawn on demand, so millions cost nothing."
    )
    eval_count: int = Field(
        96, ge=1, description="How many held-out prompts; every prefix is balanced over categories."
    )
    categories: tuple[str, ...] | None = Field(
        None,
        description="Only these categories; one that is named twice comes twice as often. Default: all of the task "
        "but `mixed` (two shapes, of which one or both are outlined).",
    )
    targets: bool = Field(False, description="Attach a picture to learn from to every prompt, for supervised stages.")
    wrong_captions: float = Field(
        0.22, ge=0, le=1, description="Share of train targets that show another scene of the same category."
    )
    degraded: float = Field(0.1, ge=0, le=1, description="Share of train targets that are blurred, pale or noisy.")
    seed: int = Field(0, ge=0, description="Another seed draws other prompts and layouts; the splits stay.")

    @field_validator("categories")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = T2I_CATEGORIES + OPTIONAL_CATEGORIES + EDIT_CATEGORIES
        for name in value or ():
            if name not in known:
                raise ValueError(f"the tiny world has no category {name!r}. There is: {', '.join(known)}.")
        if value is not None and not value:
            raise ValueError("no category is left: name at least one, or leave the option out.")
        return value

    def chosen(self) -> tuple[str, ...]:
        """The categories in the order in which prompts go through them."""
        usual = {"t2i": T2I_CATEGORIES, "edit": EDIT_CATEGORIES, "both": _in_turns()}[self.task]
        if self.categories is None:
            return usual
        allowed = usual if self.task == "edit" else usual + OPTIONAL_CATEGORIES
        foreign = [name for name in self.categories if name not in allowed]
        if foreign:
            raise ValueError(f"category {foreign[0]!r} is none of task {self.task!r}, which has: {', '.join(allowed)}.")
        return self.categories

    def model_post_init(self, context: object) -> None:
        """Refuse categories of the other task when the recipe is read, not when the run starts."""
        self.chosen()


def _in_turns() -> tuple[str, ...]:
    """Text-to-image and edit categories alternating."""
    turns = [name for pair in zip(T2I_CATEGORIES, EDIT_CATEGORIES, strict=False) for name in pair]
    return (*turns, *EDIT_CATEGORIES[len(T2I_CATEGORIES) :])


class TinyWorld(Task[TinyWorldOptions]):
    """Shapes, counts, relations, outlines, portraits and edits of them, with a held-out split by content."""

    name = "tinyworld"

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """All prompts of a split; made when indexed, always the same for the same index."""
        return WorldPrompts(self.options, split)


class WorldPrompts(Sequence[Prompt]):
    """Prompts that exist when looked at. Prompt i is a function of (options, split, i) alone."""

    def __init__(self, options: TinyWorldOptions, split: Split) -> None:
        """Draw nothing yet."""
        self.options, self.split = options, split
        self.categories = options.chosen()
        self._length = options.count if split == "train" else options.eval_count

    def __len__(self) -> int:
        """How many prompts there are."""
        return self._length

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        """Prompt `index`, or a list for a slice."""
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"prompt {index} of {self._length}")
        return self._make(index % self._length)

    def __iter__(self) -> Iterator[Prompt]:
        """All prompts in order."""
        return map(self._make, range(self._length))

    def _make(self, index: int) -> Prompt:
        turn, place = divmod(index, len(self.categories))
        category = self.categories[place]
        # A category that is named twice goes through its texts twice as fast.
        turn = turn * self.categories.count(category) + self.categories[:place].count(category)
        rng = random.Random(f"tinyworld/{self.options.seed}/{self.split}/{index}")
        request = self._request(category, turn, rng)
        route = "edit" if request.source else "t2i"
        return Prompt(
            id=f"tinyworld/{route}/{self.split}/{index:06d}",
            text=request.text,
            task=route,
            category=category,
            sources=(torch.from_numpy(render(request.source)),) if request.source else (),
            target=self._target(request, rng) if self.options.targets else None,
            metadata={METADATA_KEY: request},
        )

    def _request(self, category: str, turn: int, rng: random.Random) -> Request:
        if category in EDIT_CATEGORIES:
            return draw_edit(category, self.split, rng)
        choices = wishes(category, self.split)
        # The seed moves the start.
        return choices[(turn + self.options.seed * 7919) % len(choices)].place(rng)

    def _target(self, request: Request, rng: random.Random) -> Tensor:
        scene = request.target
        if self.split == "train":
            if rng.random() < self.options.wrong_captions:
                scene = self._another(request, rng).target
            if rng.random() < self.options.degraded:
                return torch.from_numpy(degrade(render(scene), rng))
        return torch.from_numpy(render(scene))

    def _another(self, request: Request, rng: random.Random) -> Request:
        """Another wish of the category, or another edit of the same source."""
        if request.source is not None:
            return draw_edit(request.category, self.split, rng, request.source)
        return rng.choice(wishes(request.category, self.split)).place(rng)


def degrade(picture: Picture, rng: random.Random) -> Picture:
    """A blurred, pale or noisy version of a picture, each a third of the time."""
    flaw = rng.choice((_blur, partial(_pale, rng.uniform(0.35, 0.7)), partial(_noise, rng.getrandbits(32))))
    return flaw(picture)


def _blur(picture: Picture) -> Picture:
    padded = np.pad(picture, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return np.asarray((rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / np.float32(9))


def _pale(contrast: float, picture: Picture) -> Picture:
    return np.float32(0.5) + (picture - np.float32(0.5)) * np.float32(contrast)


def _noise(seed: int, picture: Picture) -> Picture:
    drawn = np.random.default_rng(seed).standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture + np.float32(0.12) * drawn, 0, 1)
