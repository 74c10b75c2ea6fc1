"""From pictures to their faces: places, poses, sharpness, and numbers that tell persons apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from velatura.rewards.faces.detection import Detector, Found
from velatura.rewards.faces.geometry import chip, poses, sharpness
from velatura.rewards.faces.recognition import SIZE, Recogniser

PIXELS = 4 * 1024 * 1024
"""Pixels that are searched in one batch."""
FINE = 64
"""Side of the chips whose sharpness is measured: whatever is larger, is it as sharp as a small picture would be?"""


@dataclass(frozen=True, slots=True)
class Faces:
    """N faces of one picture, the surest first, on the CPU. Embeddings are biometric data: nothing writes them down."""

    boxes: Tensor
    """[N 4] left, top, right, bottom in pixels."""
    points: Tensor
    """[N 5 2] as in `geometry`."""
    confidence: Tensor
    """[N] of the detector, in [0, 1]."""
    yaw: Tensor
    """[N] degrees to the side, 0 facing us."""
    misfit: Tensor
    """[N] of the points to those of a face, in distances of the eyes."""
    sharpness: Tensor
    """[N] of the chip at 64 pixels."""
    embeddings: Tensor
    """[N D]; without columns where nobody asked for them."""
    size: tuple[int, int]
    """Height and width of the picture."""

    def __len__(self) -> int:
        return len(self.confidence)

    @property
    def heights(self) -> Tensor:
        """[N] pixels."""
        return self.boxes[:, 3] - self.boxes[:, 1]

    def only(self, rows: Tensor) -> Self:
        """Those of `rows` [N] bool, or [M] in that order."""
        fields = ("boxes", "points", "confidence", "yaw", "misfit", "sharpness", "embeddings")
        return type(self)(**{name: getattr(self, name)[rows] for name in fields}, size=self.size)


class Reader(Protocol):
    """What finds and recognises faces."""

    full: float
    """Distance of embeddings up to which two pictures of a person are as alike as two photographs may be."""
    none: float
    """Distance from which two faces are those of two persons."""
    sure: float
    """Confidence of the detector from which what it found counts as a face."""
    confidence: tuple[float, float]
    """Where a face found earns nothing for how sure the detector is, and from where everything."""

    def read(self, images: Sequence[Tensor], smallest: float, recognise: bool) -> list[Faces]:
        """The faces of pictures [3 H W] that are at least `smallest` pixels high."""


class OwnReader:
    """Faces with the weights that ship: MTCNN, then dlib's network for faces, both in torch.

    On photographs of 64 and more pixels a face the distance of two persons has a median of .7 and is below .55 for one
    pair in a hundred; dlib takes .6 as the border. Of one person under JPEG, noise, another light or a small turn it is
    .05 to .4; we know of no figures for two photographs of one person, and assume .35 as what the better ones have.
    """

    full, none = 0.35, 0.6
    sure, confidence = 0.9, (0.7, 0.95)

    def __init__(self, device: torch.device, batch: int) -> None:
        """`batch`: chips in one forward of the recogniser.

        Raises:
            VelaturaError: the weights are missing or others.
        """
        self.device, self.batch = device, batch
        self.detector, self.recogniser = Detector.load(device), Recogniser.load(device)

    def read(self, images: Sequence[Tensor], smallest: float, recognise: bool) -> list[Faces]:
        """The faces of pictures [3 H W] that are at least `smallest` pixels high."""
        found = self._find(images, smallest)
        embeddings = self._recognise(images, found) if recognise else [torch.zeros(len(one), 0) for one in found]
        return [described(*one) for one in zip(images, found, embeddings, strict=True)]

    def _find(self, images: Sequence[Tensor], smallest: float) -> list[Found]:
        """One forward for pictures of one size, as many as memory should hold."""
        found: dict[int, Found] = {}
        shapes: dict[torch.Size, list[int]] = {}
        for row, image in enumerate(images):
            shapes.setdefault(image.shape, []).append(row)
        for shape, rows in shapes.items():
            count = max(1, PIXELS // (shape[1] * shape[2]))
            for part in (rows[i : i + count] for i in range(0, len(rows), count)):
                shown = torch.stack([images[row].detach().float().clamp(0, 1) for row in part]).to(self.device)
                found.update(zip(part, self.detector(shown, smallest), strict=True))
        return [found[row] for row in range(len(images))]

    def _recognise(self, images: Sequence[Tensor], found: Sequence[Found]) -> list[Tensor]:
        """[N 128] of each picture."""
        chips = [
            chip(image.detach().float().to(self.device), points)
            for image, faces in zip(images, found, strict=True)
            for points in faces.points
        ]
        parts = [self.recogniser(torch.stack(chips[i : i + self.batch])) for i in range(0, len(chips), self.batch)]
        joined = torch.cat(parts).cpu() if parts else torch.zeros(0, SIZE)
        return list(torch.split(joined, [len(faces) for faces in found]))


def described(image: Tensor, found: Found, embeddings: Tensor) -> Faces:
    """What `found` says, with the pose and the sharpness of each face."""
    chips = [chip(image.detach().float().cpu(), points, FINE) for points in found.points]
    pose = poses(found.points)
    return Faces(
        boxes=found.boxes,
        points=found.points,
        confidence=found.confidence,
        yaw=pose.yaw,
        misfit=pose.misfit,
        sharpness=sharpness(torch.stack(chips)) if chips else torch.zeros(0, dtype=torch.float64),
        embeddings=embeddings,
        size=(image.shape[1], image.shape[2]),
    )
