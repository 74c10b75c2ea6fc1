"""A reward: judges finished pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from velatura.api import Options, RewardModel, Sample, Scores


class RednessOptions(Options):
    """Options of `redness`."""

    gain: float = Field(1.0, gt=0, description="Multiplies the score.")


class Redness(RewardModel[RednessOptions]):
    """Share of red in the light of a picture, in [0, gain].

    What cannot be judged gets a `Status`, never a made-up number; what raises is retried, counted and masked. Load
    weights in `setup`, not here.
    """

    name = "redness"

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B], higher is better; `image` is `3 H W` in [0, 1]."""
        shares = [sample.image[0].sum() / sample.image.sum().clamp_min(1e-6) for sample in samples]
        return Scores.of(self.options.gain * torch.stack(shares))
