"""The reward `keeps-to`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from velatura.api import Options, Prompt, RewardModel, Sample, Scores, Status
from velatura_palette.oklab import oklab, parsed


class KeepsToOptions(Options):
    """Options of `keeps-to`."""

    palette: list[str] = Field(
        default_factory=list,
        max_length=32,
        description="Colours as CSS writes them; those of a prompt, metadata `palette`, stand in for them.",
    )
    tolerance: float = Field(
        0.1, gt=0, description="Distance in OKLab at which a pixel counts e^-1; black and white are 1 apart."
    )
    share: float = Field(
        0.02, gt=0, le=1, description="Part of the picture that a colour has to cover to count as used."
    )

    @field_validator("palette")
    @classmethod
    def _are_colours(cls, value: list[str]) -> list[str]:
        parsed(value)
        return value


class KeepsTo(RewardModel[KeepsToOptions]):
    """Pictures made of the colours of a palette, all of them used; in [0, 1].

    score = near * used,   near = mean over pixels of k(d),   used = mean over colours c of min(1, n_c / share),
    with d the distance of a pixel to the nearest colour in OKLab, k(d) = exp(-(d / tolerance)^2), and n_c the mean of
    k over the picture, counted for the nearest colour c alone. `near` by itself is highest for a blank picture in one
    of the colours; that is what `used` is there for.
    """

    name = "keeps-to"

    @classmethod
    def example(cls) -> KeepsTo:
        """With a palette of three colours."""
        return cls(KeepsToOptions(palette=["black", "white", "tomato"]))

    def applies(self, prompt: Prompt) -> bool:
        """Where a palette is known."""
        return bool(self._palette(prompt))

    def dimension(self) -> str:
        """Taste."""
        return "aesthetics"

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B]; a picture that is not finite, or a palette that is none, fails with its reason."""
        values, status, reasons = torch.zeros(len(samples)), [], []
        for row, sample in enumerate(samples):
            problem = ""
            try:
                colours = parsed(self._palette(sample.prompt))
            except ValueError as error:
                problem = f"prompt {sample.prompt.id!r}: metadata `palette`: {error}"
            if not problem and not bool(sample.image.isfinite().all()):
                problem = "the picture has pixels that are no numbers"
            if not problem:
                values[row] = self._score(oklab(sample.image), colours)
            status.append(Status.FAILED if problem else Status.OK)
            reasons.append(problem)
        return Scores(values=values, status=tuple(status), reasons=tuple(reasons))

    def _palette(self, prompt: Prompt) -> list[str]:
        given = prompt.metadata.get("palette", self.options.palette)
        return [str(colour) for colour in given] if isinstance(given, list | tuple) else [str(given)]

    def _score(self, pixels: Tensor, colours: Tensor) -> Tensor:
        """[] of pixels [N 3] and colours [C 3]."""
        distance, nearest = torch.cdist(pixels, colours).min(1)
        close = torch.exp(-((distance / self.options.tolerance) ** 2))
        covered = torch.zeros(len(colours)).to(close).index_add_(0, nearest, close) / len(pixels)
        return close.mean() * (covered / self.options.share).clamp_max(1).mean()
