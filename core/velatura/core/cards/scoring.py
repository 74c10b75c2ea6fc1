"""Rated pictures through a reward, as a run would call it: in batches, failures retried, masked and counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from velatura.core.cards.clusters import Floats
from velatura.core.cards.ratings import Rated, RatedPicture
from velatura.core.components import RewardModel
from velatura.core.errors import VelaturaError
from velatura.core.judge import Judge, WeightedReward
from velatura.core.types import Prompt, Sample, Status, Usage

Group = tuple[int, ...]
"""Rows of pictures of one prompt."""


@dataclass(slots=True)
class Scoring:
    """One reward and the pictures it is asked about."""

    rated: Rated
    label: str
    model: RewardModel[Any]
    batch: int
    tick: Callable[[int], None]
    """Told how many pictures were scored."""
    retries: int = 1
    """Of failures, as in a run."""
    status: Counter[Status] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why scores failed."""
    seconds: list[float] = field(default_factory=list)
    """Of each call."""
    pictures: int = 0
    """Scored in these calls."""
    usage: Usage | None = None
    """Tokens of these calls, and of no other question that the model was asked; None while it counts none."""
    _known: dict[Group, Floats] = field(default_factory=dict)

    @property
    def by_group(self) -> bool:
        """Whether pictures are compared with each other."""
        return self.model.scope == "group"

    def scores(self, groups: Sequence[Group]) -> list[Floats]:
        """The scores of each group, NaN where there is none. Scored once: a later call with the same is answered from
        memory."""
        asked = groups if self.by_group else [(row,) for group in groups for row in group]
        missing = list(dict.fromkeys(group for group in asked if group not in self._known))
        for group, values in zip(missing, self.fresh(missing), strict=True):
            self._known[group] = values
        if self.by_group:
            return [self._known[group] for group in groups]
        return [np.concatenate([self._known[(row,)] for row in group]) for group in groups]

    def fresh(self, groups: Sequence[Group]) -> list[Floats]:
        """The same, scored again."""
        return self.of_samples([lambda g=group: [self.sample(row) for row in g] for group in groups])  # type: ignore[misc]

    def of_samples(self, groups: Sequence[Callable[[], Sequence[Sample]]]) -> list[Floats]:
        """Scores of groups of pictures, NaN where there is none; each group is one prompt's, made in its turn."""
        found: list[Floats] = []
        waiting: list[Sequence[Sample]] = []
        for number, make in enumerate(groups, start=1):
            waiting.append(make())
            count = sum(map(len, waiting))
            if count >= self.batch or number == len(groups):
                found += self._call(waiting)
                self.tick(count)
                waiting = []
        return found

    def sample(self, row: int, image: Tensor | None = None) -> Sample:
        """Picture `row`, or another in its place, for its prompt."""
        picture = self.rated.pictures[row]
        return Sample(prompt=prompt_of(picture), image=load(picture.path) if image is None else image, seed=row)

    def _call(self, groups: Sequence[Sequence[Sample]]) -> list[Floats]:
        """One call of the reward."""
        reward = WeightedReward(label=self.label, at=self.label, model=self.model)
        samples = [
            Sample(prompt=s.prompt, image=s.image, seed=s.seed, group=number)
            for number, group in enumerate(groups)
            for s in group
        ]
        with Judge([reward], max_failed=1.0, retries=self.retries) as judge:
            begin, before = time.perf_counter(), self.model.usage()
            judge.submit(samples)
            report = judge.report([sample.prompt for sample in samples])
            self.seconds.append(time.perf_counter() - begin)
        if (after := self.model.usage()) is not None:
            self.usage = (self.usage or Usage()) + after - (before or Usage())
        status = [Status(int(code)) for code in report.status[:, 0]]
        self.pictures += len(samples)
        self.status.update(status)
        self.reasons.update(
            reason for code, reason in zip(status, report.reasons[0], strict=True)
            if code in (Status.FAILED, Status.REFUSED)
        )  # fmt: skip
        values = np.where(report.valid[:, 0].numpy(), report.scores[:, 0].double().numpy(), np.nan)
        return np.split(values, np.cumsum([len(group) for group in groups])[:-1])

    @property
    def failed(self) -> float:
        """Share of the pictures it had to judge that got no score."""
        asked = sum(count for status, count in self.status.items() if status is not Status.NOT_APPLICABLE)
        return (self.status[Status.FAILED] + self.status[Status.REFUSED]) / asked if asked else float("nan")


def prompt_of(picture: RatedPicture) -> Prompt:
    """What was asked for, with its source pictures."""
    facts = picture.facts
    sources = tuple(load(path) for path in facts.sources)
    return Prompt(
        id=facts.key, text=facts.text, task="edit" if sources else "t2i", category=facts.category, sources=sources,
        metadata=facts.metadata,
    )  # fmt: skip


def load(path: Path) -> Tensor:
    """`3 H W` fp32 in [0, 1].

    Raises:
        VelaturaError: it is no picture.
    """
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise VelaturaError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
