"""People of the embedded world: they see what is true, and say it with a bias, with noise, and in whole levels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from velatura.api import Context, Options, Prompt, RewardModel, Sample, Scores, Status
from velatura.rewards.tinyworld import Aesthetics, Alignment

LOWEST, HIGHEST = 1, 5


class RaterOptions(Options):
    """What a rater looks at, and how unreliably."""

    looks_at: Literal["alignment", "cleanliness"] = Field(
        "alignment", description="`alignment`: share of the prompt that is there; `cleanliness`: share of clean pixels."
    )
    bias: float = Field(0.0, description="Levels that this rater adds to everything.")
    noise: float = Field(0.5, ge=0, description="Standard deviation, in levels, of what it says of one picture.")
    seed: int = Field(0, ge=0, description="Who it is: two raters of one seed say the same.")


class Rater(RewardModel[RaterOptions]):
    """A simulated rater of text-to-image pictures: level = round(1 + 4 truth + bias + noise), kept within 1 to 5.

    The noise is normal and belongs to rater, prompt and picture: asked again, a rater says the same again. Ours.
    """

    name = "tinyworld-rater"

    def setup(self, context: Context) -> None:
        """Nothing is loaded; the truth is computed."""
        self._truth = Alignment() if self.options.looks_at == "alignment" else Aesthetics()

    def applies(self, prompt: Prompt) -> bool:
        """Text-to-image prompts of the world."""
        return Alignment().applies(prompt)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] whole levels, 1 to 5."""
        truth = self._truth.score(samples)
        values = [
            float(self._said(value, sample)) if status is Status.OK else 0.0
            for value, status, sample in zip(truth.values.tolist(), truth.status, samples, strict=True)
        ]
        return Scores(values=torch.tensor(values), status=truth.status, reasons=truth.reasons)

    def _said(self, truth: float, sample: Sample) -> int:
        felt = LOWEST + (HIGHEST - LOWEST) * truth + self.options.bias + self.options.noise * self._mood(sample)
        return min(HIGHEST, max(LOWEST, math.floor(felt + 0.5)))

    def _mood(self, sample: Sample) -> float:
        """Standard normal, by Box and Muller from a hash of rater, prompt and picture."""
        pixels = (sample.image.detach().cpu().float().clamp(0, 1) * 255).round().byte().contiguous().numpy().tobytes()
        digest = hashlib.sha256(f"{self.options.seed}/{self.options.looks_at}/{sample.prompt.text}/".encode() + pixels)
        first, second = (int.from_bytes(digest.digest()[i : i + 6], "big") for i in (0, 6))
        radius = math.sqrt(-2 * math.log((first + 1) / 2**48))
        return radius * math.cos(2 * math.pi * second / 2**48)
