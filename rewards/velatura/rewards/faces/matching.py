"""Which face of a picture is which face of its source, and what that is worth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from velatura.rewards.faces.reading import Faces


def distances(required: Faces, shown: Faces) -> Tensor:
    """[J K] Euclidean distances of the embeddings."""
    return torch.cdist(
        required.embeddings.double(), shown.embeddings.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )


def assigned(required: Faces, shown: Faces, prior: float) -> Tensor:
    """[J] distance of each required face to the one of the K shown that it is taken for; infinite where none is left.

    The assignment with the least sum of distance - prior * overlap (Kuhn 1955, by scipy), one to one. The overlap is
    the intersection over the union of the boxes, as shares of their pictures.
    """
    from scipy.optimize import linear_sum_assignment

    apart = distances(required, shown)
    rows, columns = linear_sum_assignment((apart - prior * overlap(required, shown)).numpy())
    matched = torch.full((len(required),), math.inf, dtype=torch.float64)
    matched[torch.from_numpy(rows)] = apart[rows, columns]
    return matched


def overlap(required: Faces, shown: Faces) -> Tensor:
    """[J K] intersection over union of the boxes, each a share of its picture."""
    one, other = relative(required)[:, None], relative(shown)[None]
    size = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp_min(0)
    both = size.prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
    return both / (areas[0] + areas[1] - both).clamp_min(1e-12)


def relative(faces: Faces) -> Tensor:
    """[N 4] boxes as shares of width and height."""
    height, width = faces.size
    return faces.boxes.double() / torch.tensor([width, height, width, height], dtype=torch.float64)


def ramp(x: Tensor, start: float, end: float) -> Tensor:
    """0 up to `start`, 1 from `end` on, linear in between; falls where `start` is above `end`."""
    return ((x - start) / (end - start)).clamp(0, 1)
