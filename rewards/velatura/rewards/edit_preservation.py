"""The reward `edit-preservation`: an edit changes what it should, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, max_pool2d

from velatura.api import Context, Options, Prompt, RewardModel, Sample, Scores, Status, VelaturaError
from velatura.rewards.backbone import Backbone
from velatura.rewards.measured import Measured, measured

LEVELS = 64
"""Of the histogram from which the threshold of an estimated region is read."""


class EditPreservationOptions(Options):
    """Options of `edit-preservation`."""

    path: str = Field(
        "facebook/dinov2-small",
        description="A vision model of transformers: a folder, seen from the recipe, or a name on the hub; or "
        "`efficientnet-lite0`, whose weights come in a package.",
    )
    size: int | None = Field(None, ge=16, description="Pixels of the square it sees; null: what it was trained on.")
    field: str = Field("edit_region", description="Where the metadata of a prompt say what should change.")
    source: int = Field(0, ge=0, description="Which source is being edited, of several.")
    tolerance: float = Field(
        0.1,
        gt=0,
        description="Distance outside the region at which the score has fallen to 1/e; 1 is entirely different.",
    )
    change: float = Field(
        0.3,
        gt=0,
        description="Distance inside the region from which an edit counts as made in full; less counts in part.",
    )
    floor: float = Field(
        0.1, gt=0, description="Least distance of a place that is counted to the region, where that is estimated."
    )
    area: float = Field(
        0.5, ge=0, le=1, description="Where the region is estimated: share of the score lost by changing everything."
    )
    margin: int = Field(1, ge=0, description="Places around the region that are not held against the edit.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="`auto` is the device of the run; or `cuda:1`."
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """What the score of an edit is made of."""

    made: float
    """In [0, 1]: how much of a change there is where one was asked for."""
    outside: float
    """Mean distance where nothing should have changed."""
    share: float
    """Of the picture that the region covers."""


class EditPreservation(RewardModel[EditPreservationOptions]):
    """made · exp(-outside / tolerance), in [0, 1]: low for edits that change too much, or nothing.

    Source and picture are compared place by place by the features of a frozen network; distances are 1 - cosine over
    that of unrelated places. Outside is the mean distance where nothing should change. Made is the distance of the
    most changed tenth of the region over `change`, at most 1, so that a copy of the source scores 0.

    What should change stands in the metadata of the prompt under `field`: boxes [left, top, right, bottom] in shares of
    width and height, the path of a mask (a PNG file below the recipe's folder; white changes; a server opens none), or
    [] where nothing should (then made is 1). Where it is not said, the region is estimated from both pictures: the
    places above the threshold that best splits the distances in two (Otsu 1979), at least `floor`. Such a region may be
    wherever the edit was made, so the score loses `area` times the share that it covers.

    Known holes. It does not read the instruction: any change at the right place is a change. Estimated, it cannot tell
    an additional change from the one asked for except by its area, and holds large edits (a new background) against
    those who make them well, so say the region, or compare within a prompt only. Shifts of a pixel count, and changes
    smaller than a place of the network do not. Beside a reward for the instruction.
    """

    name = "edit-preservation"
    operational = frozenset({"device"})
    _backbone: Backbone | None = None
    _context: Context | None = None

    def setup(self, context: Context) -> None:
        """Load the network.

        Raises:
            VelaturaError: it is not there.
        """
        options = self.options
        place = context.device if options.device == "auto" else torch.device(options.device)
        self._backbone = Backbone(self.name, options.path, options.size, place, context)
        self._context = context

    def dimension(self) -> str:
        """What should stay."""
        return "preservation"

    def applies(self, prompt: Prompt) -> bool:
        """Edits."""
        return len(prompt.sources) > self.options.source

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]; the notes say what each is made of."""
        if self._backbone is None:
            raise VelaturaError(f"'{self.name}' has no network yet: call `setup` before it is asked.")
        known: dict[int, Tensor] = {}
        return measured(samples, lambda sample: self._answer(sample, known))

    def _answer(self, sample: Sample, known: dict[int, Tensor]) -> Measured:
        """What a client of a server wrote wrong costs its own pictures; in a run it ends the stage."""
        try:
            return self._judge(sample, known)
        except VelaturaError as error:
            if not sample.prompt.foreign:
                raise
            return Measured(status=Status.FAILED, reason=str(error))

    def _judge(self, sample: Sample, known: dict[int, Tensor]) -> Measured:
        """`known`: features of sources by the prompt object, kept for one call; clients may share ids."""
        assert self._backbone is not None
        prompt, options = sample.prompt, self.options
        if not self.applies(prompt):
            return Measured(status=Status.NOT_APPLICABLE, reason="The prompt has no source to keep.")
        if id(prompt) not in known:
            (known[id(prompt)],) = self._backbone.features([prompt.sources[options.source]])
        (seen,) = self._backbone.features([sample.image])
        distance = self._backbone.distance(known[id(prompt)], seen)
        region = self._region(prompt, (int(distance.shape[0]), int(distance.shape[1])))
        parts = self._asked(distance, region) if region is not None else self._estimated(distance)
        if parts is None:
            return Measured(status=Status.NOT_APPLICABLE, reason="The region leaves no place that should stay.")
        value = parts.made * float(np.exp(-parts.outside / options.tolerance))
        value *= 1.0 if region is not None else 1 - options.area * parts.share
        how = "asked for" if region is not None else "estimated"
        note = f"made {parts.made:.2f}, outside {parts.outside:.3f}, region {parts.share:.0%} ({how})"
        return Measured(value, note=note)

    def _asked(self, distance: Tensor, region: Tensor) -> Parts | None:
        """For a region [h w] that was said; None where everything may change."""
        kept = ~grown(region, self.options.margin)
        if not bool(kept.any()):
            return None
        made = 1.0 if not bool(region.any()) else self._made(distance[region])
        return Parts(made, float(distance[kept].mean()), float(region.float().mean()))

    def _estimated(self, distance: Tensor) -> Parts:
        region = distance > max(self.options.floor, threshold(distance))
        kept = ~grown(region, self.options.margin)
        kept = kept if bool(kept.any()) else ~region
        made = self._made(distance[region]) if bool(region.any()) else self._made(distance.flatten())
        outside = float(distance[kept].mean()) if bool(kept.any()) else float(distance.mean())
        return Parts(made, outside, float(region.float().mean()))

    def _made(self, distances: Tensor) -> float:
        """From the mean of the most changed tenth."""
        most = distances.topk(max(1, len(distances) // 10)).values
        return min(1.0, float(most.mean()) / self.options.change)

    def _region(self, prompt: Prompt, grid: tuple[int, int]) -> Tensor | None:
        """[h w] places of which a part should change; None where the prompt does not say.

        Raises:
            VelaturaError: what it says is neither boxes nor a mask.
        """
        said = prompt.metadata.get(self.options.field)
        if said is None:
            return None
        if isinstance(said, Tensor):
            mask = said.float()
        elif isinstance(said, str):
            mask = self._mask(prompt, said)
        else:
            mask = boxes(prompt, self.options.field, said)
        return adaptive_max_pool2d(mask[None], grid)[0] > 0.5

    def _mask(self, prompt: Prompt, path: str) -> Tensor:
        """[H W] in [0, 1] of a PNG file below the recipe's folder.

        Raises:
            VelaturaError: it lies elsewhere, is no PNG file, or a client of a server names it.
        """
        assert self._context is not None
        if prompt.foreign:
            raise VelaturaError(
                f"Prompt {prompt.id!r}: its metadata field {self.options.field!r} names a file, and a server opens no "
                "file that a request names. Send boxes [left, top, right, bottom] in shares of width and height."
            )
        base = Path(os.path.normpath(self._context.base.absolute()))
        file = Path(os.path.normpath(base / path))
        if not file.is_relative_to(base):
            raise VelaturaError(
                f"Prompt {prompt.id!r}: its mask {path!r} is not below {base}, the recipe's folder. Put masks there, "
                "or a link to the folder that holds them."
            )
        try:
            with Image.open(file, formats=["PNG"]) as picture:
                return torch.from_numpy(np.array(picture.convert("L"))).float() / 255
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise VelaturaError(f"Prompt {prompt.id!r}: its mask {file} does not open ({error}).") from error


FINE = 256
"""Cells along each side in which boxes are drawn."""


def boxes(prompt: Prompt, field: str, said: Any) -> Tensor:
    """[FINE FINE] ones in the boxes, zeros elsewhere.

    Raises:
        VelaturaError: they are no boxes.
    """
    many = [said] if isinstance(said, list | tuple) and said and isinstance(said[0], int | float) else said
    mask = torch.zeros(FINE, FINE)
    if not isinstance(many, list | tuple):
        many = [None]
    for box in many:
        is_box = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(n, int | float) for n in box)
        if not (is_box and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise VelaturaError(
                f"Prompt {prompt.id!r}: its metadata field {field!r} holds {said!r}. 'edit-preservation' reads boxes "
                f'[left, top, right, bottom] in shares of width and height there, like "{field}": [[0.1, 0.2, 0.5, '
                "0.9]], the path of a mask, or [] where nothing should change."
            )
        left, top, right, bottom = (round(float(n) * FINE) for n in box)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = 1
    return mask


def grown(region: Tensor, margin: int) -> Tensor:
    """[h w] with `margin` places around."""
    if not margin:
        return region
    return max_pool2d(region[None].float(), 2 * margin + 1, 1, margin)[0] > 0


def threshold(distances: Tensor) -> float:
    """The value that splits them into two classes with the most variance between (Otsu 1979)."""
    top = float(distances.max())
    if top <= 0:
        return 0.0
    counts = torch.histc(distances, LEVELS, 0, top)
    places = (torch.arange(LEVELS) + 0.5) * top / LEVELS
    below, mass = counts.cumsum(0), (counts * places).cumsum(0)
    above = below[-1] - below
    split = (below > 0) & (above > 0)
    if not bool(split.any()):
        return top
    gap = mass / below.clamp_min(1) - (mass[-1] - mass) / above.clamp_min(1)
    between = torch.where(split, below * above * gap.square(), -1.0)
    return float((int(between.argmax()) + 1) * top / LEVELS)
