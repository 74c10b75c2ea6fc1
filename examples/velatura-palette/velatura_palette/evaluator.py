"""The evaluator `colour`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from velatura.api import Evaluator, NoOptions, Sample
from velatura_palette.oklab import oklab


class Colour(Evaluator[NoOptions]):
    """How colourful pictures are and how much they differ in light: what a reward for colours may do to them.

    `colourfulness`: of Hasler & Süsstrunk (2003), sqrt(var rg + var yb) + 0.3 sqrt((mean rg)^2 + (mean yb)^2) with
    rg = R - G, yb = (R + G) / 2 - B, of values 0 to 255; 0 is grey, above 80 is highly colourful.
    `contrast`: standard deviation of the lightness in OKLab, in [0, 0.5]. None for pictures that are not finite.
    """

    name = "colour"

    def evaluate(self, samples: Sequence[Sample]) -> Mapping[str, Sequence[float | None]]:
        """Two metrics of B values."""
        finite = [bool(sample.image.isfinite().all()) for sample in samples]
        return {
            metric: [measure(s.image) if sound else None for s, sound in zip(samples, finite, strict=True)]
            for metric, measure in (("colourfulness", colourfulness), ("contrast", contrast))
        }


def colourfulness(image: Tensor) -> float:
    """Of a picture [3 H W] in [0, 1]."""
    red, green, blue = 255 * image.detach().float().flatten(1)
    axes = torch.stack([red - green, (red + green) / 2 - blue])
    spread = axes.var(1, correction=0).sum().sqrt()
    return float(spread + 0.3 * axes.mean(1).square().sum().sqrt())


def contrast(image: Tensor) -> float:
    """Of a picture [3 H W] in [0, 1]."""
    return float(oklab(image)[:, 0].std(correction=0))
