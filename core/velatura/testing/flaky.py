"""A plugin with a reward that fails when it is told to: to see what a run, a report or a reward of yours does then.

Name this file (`velatura.testing.fixtures.FLAKY`) under `plugins:`, and the reward as `flaky/brightness`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal
from zlib import crc32

import torch
from pydantic import Field

from velatura.api import Options, RewardModel, Sample, Scores, Status, hookimpl


class BrightnessOptions(Options):
    """Options of `brightness`."""

    every: int = Field(
        0,
        ge=0,
        description="Fails on the pictures whose number, a hash of prompt id and seed, this divides; 0: on none.",
    )
    how: Literal["raise", "failed", "refused", "nan"] = Field(
        "raise", description="An exception for the whole call, a status with a reason, or a NaN that claims to count."
    )


class Brightness(RewardModel[BrightnessOptions]):
    """Mean of all pixels in [0, 1], but for pictures on which it fails."""

    name = "brightness"

    def fails_on(self, sample: Sample) -> bool:
        """Whether it fails on this picture: always the same for a prompt and a seed."""
        number = crc32(f"{sample.prompt.id}/{sample.seed}".encode())
        return self.options.every > 0 and number % self.options.every == 0

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B].

        Raises:
            RuntimeError: with `how: raise`, where one of them is a picture on which it fails.
        """
        failing = [self.fails_on(sample) for sample in samples]
        how = self.options.how
        if how == "raise" and any(failing):
            raise RuntimeError("this reward was told to fail")
        values = torch.stack([sample.image.mean() for sample in samples])
        values = torch.where(torch.tensor(failing), math.nan if how == "nan" else 0.0, values)
        bad = {"failed": Status.FAILED, "refused": Status.REFUSED}.get(how, Status.OK)
        return Scores(
            values=values,
            status=tuple(bad if fails else Status.OK for fails in failing),
            reasons=tuple("this reward was told to fail" if fails else "" for fails in failing),
        )


@hookimpl
def velatura_reward() -> Sequence[type[RewardModel[BrightnessOptions]]]:
    """The one reward."""
    return [Brightness]
