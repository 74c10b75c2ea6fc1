"""The reward `portrait-checks`: as many faces as were asked for, each sure, large, sharp and in the shape of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Context, Prompt, Sample, Scores, Status, VelaturaError
from velatura.rewards.brisque import Regression, features_of, folder_of_parameters, luminance
from velatura.rewards.faces.matching import ramp
from velatura.rewards.faces.options import FaceOptions, FaceReward, asked_for, open_reader, surely
from velatura.rewards.faces.reading import Faces, Reader
from velatura.rewards.measured import Measured, measured

SMALLEST = 16
"""Pixels of height of the smallest face that is looked for."""
SHARPNESS = (0.08, 0.18)
MISFIT = (0.3, 0.12)
"""Where each check gives nothing, and from where it gives everything. Of 62 generated faces 99 % misfit by below .1."""
CLEAN = (20.0, 80.0)
"""The same for 100 - BRISQUE."""


class PortraitOptions(FaceOptions):
    """Options of `portrait-checks`."""

    categories: tuple[str, ...] = Field(
        ("portrait",), description="Categories of prompts that are judged; others only if their metadata has `field`."
    )
    field: str = Field("faces", min_length=1, description="The metadata field with the number of faces asked for.")
    faces: int = Field(1, ge=0, description="How many are asked for where the metadata does not say.")
    share: float = Field(
        0.15, gt=0, le=1, description="Height of a face, of the shorter side of the picture, that is large enough."
    )
    extra: float = Field(0.5, ge=0, description="What a face too many costs, over the number of faces asked for.")
    brisque: bool = Field(
        False, description="Whether the quality of each face by `brisque` is a fifth check; needs its parameters."
    )


class PortraitChecks(FaceReward[PortraitOptions]):
    """Whether a portrait shows the faces it was asked for, well enough to be found; in [0, 1].

    r = sum of the n best q / n - extra e / n, at least 0: n faces asked for, e those beyond, and q the geometric mean
    of four checks, each in [0, 1]: confidence of the detector (MTCNN), height, how well eyes, nose and mouth fit those
    of a face that is turned by up to 75 degrees, and sharpness of the face at 64 pixels. A face that is missing has
    q = 0; with n = 0 each face costs `extra`.

    Known holes. It knows when a face is missing, doubled, tiny, blurred or squashed, and nothing of beauty, likeness,
    skin, hands or age; a photograph of any face scores 1. The detector sees five points in the order of a face even
    where a mouth is out of place, so the third check is the weakest: a judge has to look at anatomy. Profiles, covered
    and painted faces are often not found and count as missing: keep such prompts out of `categories`. Grain passes as
    sharpness.
    """

    name = "portrait-checks"
    _reader: Reader | None = None
    _quality: Regression | None = None

    def setup(self, context: Context) -> None:
        """Load the networks.

        Raises:
            VelaturaError: weights or an extra are missing or others.
        """
        self._reader = open_reader(self.name, self.options, context)
        if self.options.brisque:
            self._quality = Regression.read(folder_of_parameters())

    def dimension(self) -> str:
        """Whether there are faces, whole and sharp."""
        return "portrait"

    def applies(self, prompt: Prompt) -> bool:
        """Text-to-image prompts of the categories, and those that say how many faces they want."""
        asked = asked_for(prompt, self.options.field)
        return not prompt.sources and (asked is not None or prompt.category in self.options.categories)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]; what was found stands in the notes."""
        reader = self._open
        judged = [s for s in samples if self.applies(s.prompt) and bool(s.image.isfinite().all())]
        found = {
            id(sample): self._judge(sample, faces)
            for size, rows in by_side(judged).items()
            for sample, faces in zip(
                rows,
                reader.read([s.image for s in rows], max(SMALLEST, size * self.options.share / 4), recognise=False),
                strict=True,
            )
        }
        outside = Measured(status=Status.NOT_APPLICABLE, reason="The prompt asks for no portrait")
        return measured(samples, lambda sample: found.get(id(sample), outside))

    @property
    def _open(self) -> Reader:
        if self._reader is None:
            raise VelaturaError(f"'{self.name}' has no networks yet: call `setup` before it is asked.")
        return self._reader

    def _judge(self, sample: Sample, faces: Faces) -> Measured:
        asked = asked_for(sample.prompt, self.options.field)
        wanted = self.options.faces if asked is None else asked
        checks = self._checks(sample.image, faces)
        quality = checks.prod(1) ** (1 / checks.shape[1])
        order = quality.argsort(descending=True, stable=True)
        extra = int((faces.confidence[order[wanted:]] >= surely(self.options, self._open)).sum())
        credit = float(quality[order[:wanted]].sum()) - self.options.extra * extra
        said = "; ".join(" ".join(f"{check:.2f}" for check in row) for row in checks[order].tolist())
        names = "confidence size shape sharpness" + (" brisque" if self._quality else "")
        note = f"{len(faces)} faces for {wanted}" + (f", {names}: {said}" if len(faces) else "")
        return Measured(min(max(credit / max(wanted, 1) + (wanted == 0), 0.0), 1.0), note=note)

    def _checks(self, image: Tensor, faces: Faces) -> Tensor:
        """[N 4], or 5 with `brisque`, each in [0, 1]."""
        columns = [
            ramp(faces.confidence.double(), *self._open.confidence),
            (faces.heights.double() / min(faces.size) / self.options.share).clamp(0, 1),
            ramp(faces.misfit, *MISFIT),
            ramp(faces.sharpness, *SHARPNESS),
        ]
        if self._quality is not None:
            clean = [clean_share(self._quality, crop(image, box)) for box in faces.boxes]
            columns.append(torch.tensor(clean, dtype=torch.float64))
        return torch.stack(columns, 1)


def by_side(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    """Samples by the shorter side of their pictures: how small a face may be depends on it."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(min(sample.image.shape[-2:]), []).append(sample)
    return found


def crop(image: Tensor, box: Tensor) -> Tensor:
    """[3 h w]: what lies in the box [4] and in the picture."""
    left, top, right, bottom = (int(side) for side in box.round().clamp_min(0).tolist())
    return image[:, top : bottom + 1, left : right + 1]


def clean_share(model: Regression, face: Tensor) -> float:
    """100 - BRISQUE of a face as a number in [0, 1]; 0 where it is flat or below 32 pixels."""
    if min(face.shape[-2:]) < 32:
        return 0.0
    features = features_of(luminance(face))
    if not bool(features.isfinite().all()):
        return 0.0
    return float(ramp(torch.tensor(100.0 - model.predict(features), dtype=torch.float64), *CLEAN))
