"""Rewards to be watched at weight 0, `spectrum` and `saturation`: they fall when pictures go wrong, and pay nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from velatura.api import Options, RewardModel, Sample, Scores, Status
from velatura.rewards.measured import Measured, measured

LEAST = 1e-6
"""Shares of energy below this count as this."""
ROUNDING = 1 / (12 * 255**2)
"""Variance of rounding to 8 bits: with less energy than this a picture is flat."""
SHORTEST = 16
"""Pixels of the shorter side that a spectrum needs."""
GREY = (0.299, 0.587, 0.114)


class SpectrumOptions(Options):
    """Options of `spectrum`."""

    low: float = Field(0.001, ge=LEAST, le=1, description="Least share of fine energy that raises no alarm.")
    high: float = Field(
        0.2,
        ge=LEAST,
        le=1,
        description="Largest such share. With `low` and `high` both at the median of the model before training, the "
        "reward shows any drift from it.",
    )
    cutoff: float = Field(0.25, gt=0, lt=0.7, description="Fine is what has more cycles a pixel than this.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"`low` ({self.low:g}) is above `high` ({self.high:g}): exchange them")
        return self


class Spectrum(RewardModel[SpectrumOptions]):
    """Minus the decades by which the share of fine detail lies outside [low, high]; in [-6, 0], 0 raises no alarm.

    share = energy above `cutoff` / (energy + that of rounding to 8 bits), of the luminance without its mean under a
    Hann window, at the resolution that the picture has. Grain, speckle and grids of the latent raise it, oily and
    blurred pictures lower it, which judges that look at thumbnails do not see.

    Fifteen photographs and scans of 200 to 1400 pixels had shares of .001 to .26, most of them .01 to .06: the default
    range is for gross faults. Smaller pictures have larger shares, so give the range of your own model at its size. The
    share of each picture stands in the notes.

    Known holes. A few noisy and a few blurred places cancel; a grid of 8 or 16 pixels is seen by its harmonics only;
    what is finely textured by nature, grass or lace, raises an alarm by itself. Do not train on it: a policy meets any
    share with noise.
    """

    name = "spectrum"

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [-6, 0], with the shares as notes; pictures below 16 pixels a side fail."""
        return measured(samples, self._judge)

    def _judge(self, sample: Sample) -> Measured:
        height, width = sample.image.shape[-2:]
        if min(height, width) < SHORTEST:
            reason = f"The picture has {height} x {width} pixels, and its spectrum needs {SHORTEST} on each side"
            return Measured(status=Status.FAILED, reason=reason)
        share = fine_share(sample.image, self.options.cutoff)
        bounded = min(max(share, self.options.low, LEAST), self.options.high)
        return Measured(0.0 - abs(math.log10(max(share, LEAST) / bounded)), note=f"fine share {share:.2g}")


class SaturationOptions(Options):
    """Options of `saturation`."""

    high: float = Field(
        0.2, ge=0, lt=1, description="Share of such pixels that raises no alarm; with 0 the reward is minus the share."
    )
    margin: float = Field(0.004, ge=0, lt=0.5, description="How near to the end of the range a clipped channel is.")
    vivid: float = Field(
        0.9,
        gt=0,
        le=1,
        description="A colour is too strong from this distance of its strongest to its weakest channel.",
    )


class Saturation(RewardModel[SaturationOptions]):
    """Minus the share of clipped and over-saturated pixels above `high`, over the rest; in [-1, 0], 0 raises no alarm.

    r = -max(0, share - high) / (1 - high). A pixel counts when a channel is at its upper end, when all are at the lower
    one, or when strongest and weakest are `vivid` apart. Rewards that like gloss drive pictures there. Fifteen
    photographs and scans had shares of 0 to .13. Both parts stand in the notes, for each picture.

    Known holes. White paper, black skies and flags are made of such pixels: compare with the model before training, by
    category. Colours just inside the bounds are not seen. Do not train on it: grey fog scores best.
    """

    name = "saturation"

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [-1, 0], with the shares as notes."""
        return measured(samples, self._judge)

    def _judge(self, sample: Sample) -> Measured:
        options, pixels = self.options, sample.image.detach().float().cpu().clamp(0, 1)
        most, least = pixels.amax(0), pixels.amin(0)
        clipped = (most >= 1 - options.margin) | (most <= options.margin)
        vivid = most - least >= options.vivid
        share = float((clipped | vivid).double().mean())
        note = f"clipped {clipped.double().mean():.2g}, vivid {vivid.double().mean():.2g}"
        return Measured(0.0 - max(0.0, share - options.high) / (1 - options.high), note=note)


def fine_share(image: Tensor, cutoff: float) -> float:
    """Share of the energy of [3 H W] above `cutoff` cycles a pixel, in [0, 1]; 0 for a flat picture."""
    grey = torch.einsum("chw,c->hw", image.detach().double().cpu().clamp(0, 1), torch.tensor(GREY).double())
    window, fine = frame(*grey.shape, cutoff)
    shown = (grey - (grey * window).sum() / window.sum()) * window
    power = torch.fft.fft2(shown, norm="ortho").abs().square() / window.square().sum()
    return float(power[fine].sum() / (power.sum() + ROUNDING))


@lru_cache(maxsize=8)
def frame(height: int, width: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """[H W] Hann window, and [H W] bool: the places of a transform above `cutoff`."""
    window = torch.outer(*(torch.hann_window(side, dtype=torch.float64) for side in (height, width)))
    down, across = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    return window, torch.hypot(down[:, None], across[None]) > cutoff
