"""Shapes of five points: the similarity between two of them, the pose of a face, and chips cut out along it.

Points are x and y in pixels, x to the right and y down, the middle of the first pixel at (.5, .5): left eye (the one
further left in an upright picture), right eye, nose, left and right corner of the mouth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from velatura.rewards.faces.recognition import SIDE

TEMPLATE = ((48.4, 45.4), (101.5, 45.3), (72.6, 79.3), (53.0, 108.2), (99.4, 108.6))
"""Where MTCNN sees the points in the chips that dlib cuts out (150 pixels, padding .25): a median over faces."""
DEPTH = (0.0, 0.0, 0.43, 0.05, 0.05)
"""How far the points stand out from the plane of the eyes, in distances of the eyes: 27 mm for a nose, of 63 mm."""
YAWS = tuple(range(-75, 76, 5))
PITCHES = tuple(range(-30, 31, 10))
"""Degrees that poses are looked for among."""
FINEST = 8
"""A chip is averaged from at most so many samples a pixel and axis."""


@dataclass(frozen=True, slots=True)
class Poses:
    """How N faces are turned, and how well their points fit a face at all."""

    yaw: Tensor
    """[N] degrees to the side, 0 facing us."""
    pitch: Tensor
    """[N] degrees up or down."""
    misfit: Tensor
    """[N] root mean square distance of the points from those of a turned face, in distances of the eyes of it."""


def template() -> Tensor:
    """[5 2] the points in a chip."""
    return torch.tensor(TEMPLATE, dtype=torch.float64)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """[2 3] of [s R | t], the similarity that brings points [M 2] nearest to others, by Umeyama (PAMI 13, 1991).

    s R x + t with the least sum of squares; R turns and never mirrors. Points that fall together have scale 0.
    """
    source, target = source.double(), target.double()
    middle, aim = source.mean(0), target.mean(0)
    centred = source - middle
    covariance = (target - aim).T @ centred / len(source)
    left, sizes, right = torch.linalg.svd(covariance)
    signs = torch.ones(2, dtype=torch.float64, device=source.device)
    signs[-1] = torch.sign(torch.linalg.det(left) * torch.linalg.det(right))
    turn = left @ torch.diag(signs) @ right
    spread = centred.square().sum(1).mean()
    scale = torch.where(spread > 0, (sizes * signs).sum() / spread.clamp_min(1e-30), torch.zeros_like(spread))
    return torch.cat([scale * turn, (aim - scale * turn @ middle)[:, None]], 1)


def chip(image: Tensor, points: Tensor, side: int = SIDE) -> Tensor:
    """[3 side side]: the face with the points [5 2], out of a picture [3 H W], upright and of standard size.

    Bilinear; what is made smaller is averaged from several samples a pixel. Beyond the border the last pixels go on.
    """
    back = similarity(template() * side / SIDE, points.cpu()).to(points.device)
    scale = float(back[:, :2].norm() / math.sqrt(2))
    fine = min(max(math.ceil(scale - 0.25), 1), FINEST)
    places = (torch.arange(side * fine, dtype=torch.float64, device=image.device) + 0.5) / fine
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    x, y = (columns[..., None] * back[:, 0] + rows[..., None] * back[:, 1] + back[:, 2]).unbind(-1)
    height, width = image.shape[-2:]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], -1)[None].float()
    drawn = grid_sample(image[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return avg_pool2d(drawn, fine)[0]


def poses(points: Tensor) -> Poses:
    """Of faces [N 5 2], by the turned template that a similarity brings nearest to their points.

    With z and w the points and the template as complex numbers around their mean, the least misfit of a similarity is
    |z|^2 - |w* z|^2 / |w|^2; the distance of the eyes comes from the same fit.
    """
    z = as_complex(points.double().cpu())
    angles, turned = turned_templates()
    overlap = (turned.conj()[None] * z[:, None]).sum(-1)
    power = turned.abs().square().sum(-1)
    misfit = (z.abs().square().sum(-1)[:, None] - overlap.abs().square() / power).clamp_min(0)
    best = misfit.argmin(1)
    rows = torch.arange(len(z))
    eyes = (overlap[rows, best].abs() / power[best]).clamp_min(1e-12)
    yaw, pitch = angles[best].unbind(-1)
    return Poses(yaw=yaw, pitch=pitch, misfit=(misfit[rows, best] / points.shape[1]).sqrt() / eyes)


@lru_cache(maxsize=1)
def turned_templates() -> tuple[Tensor, Tensor]:
    """Yaw and pitch [K 2] in degrees, and the template so turned [K 5], complex, in distances of the eyes."""
    flat = template()
    flat = (flat - flat[:2].mean(0)) / (flat[1, 0] - flat[0, 0])
    depth = torch.tensor(DEPTH, dtype=torch.float64)
    angles = torch.tensor([(yaw, pitch) for yaw in YAWS for pitch in PITCHES], dtype=torch.float64)
    yaw, pitch = torch.deg2rad(angles).T[..., None]
    x = flat[:, 0] * yaw.cos() + depth * yaw.sin()
    z = depth * yaw.cos() - flat[:, 0] * yaw.sin()
    y = flat[:, 1] * pitch.cos() + z * pitch.sin()
    return angles, as_complex(torch.stack([x, y], -1))


def as_complex(points: Tensor) -> Tensor:
    """[... M 2] to [... M], around their mean."""
    centred = points - points.mean(-2, keepdim=True)
    return torch.complex(centred[..., 0], centred[..., 1])


def sharpness(chips: Tensor) -> Tensor:
    """[N] of chips [N 3 S S]: the share of their contrast that changes from one pixel to the next.

    Root of the mean squared differences of neighbours over twice the variance, both of luminance: 1 for white noise, 0
    for a flat or smooth chip. At 64 pixels photographs have .2 to .35, blurred by 2 % of the height of the face .12 to
    .15, and by 3 %, where the recogniser fails, .10 to .12.
    """
    grey = torch.einsum("nchw,c->nhw", chips.double().cpu(), torch.tensor((0.299, 0.587, 0.114)).double())
    grey = grey - grey.mean((1, 2), keepdim=True)
    steps = grey.diff(dim=1).square().mean((1, 2)) + grey.diff(dim=2).square().mean((1, 2))
    return (steps / (4 * grey.square().mean((1, 2)).clamp_min(1e-12))).sqrt()
