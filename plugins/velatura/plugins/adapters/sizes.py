"""Heights and widths of pictures: what a network can draw, and buckets of few shapes for pictures of many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import interpolate

from velatura.api import VelaturaError

Size = tuple[int, int]
"""Height and width."""
Buckets = Literal["auto"] | tuple[Size, ...]
"""What may be written for `buckets`."""
RATIOS = (1.0, 5 / 4, 3 / 2, 16 / 9, 2.0)
"""Aspect ratios of `auto`, lying and standing: nothing up to 9:4 is stretched by more than an eighth."""


def shape_of(image: Tensor) -> Size:
    """Height and width of `3 H W`."""
    return image.shape[1], image.shape[2]


def sides(area: float, ratio: float) -> tuple[int, int]:
    """Width and height of `area` and width / height `ratio`, each to the nearest multiple of 32 that is not 0."""
    width = math.sqrt(area * ratio)
    return max(32, round(width / 32) * 32), max(32, round(width / ratio / 32) * 32)


def drawable(size: Size, multiple: int, who: str, adapter: str) -> Size:
    """`size`, whose sides are multiples of `multiple` pixels.

    Raises:
        VelaturaError: they are not; the message begins with `who` asked for it, and ends with the nearest size.
    """
    if size[0] % multiple or size[1] % multiple:
        height, width = (_to(side, multiple) for side in size)
        raise VelaturaError(
            f"{who} a picture of {size[1]} x {size[0]} pixels (width x height); the sides of '{adapter}' are multiples "
            f"of {multiple}. The nearest size is {width} x {height}."
        )
    return size


def buckets_of(given: Buckets, area: int, multiple: int, adapter: str) -> tuple[Size, ...]:
    """The sizes of all buckets; `auto` makes them of `area` pixels.

    Raises:
        VelaturaError: one that is given cannot be drawn.
    """
    if given != "auto":
        return tuple(drawable(size, multiple, "`buckets` has", adapter) for size in given)
    ratios = [*RATIOS, *(1 / ratio for ratio in RATIOS[1:])]
    return tuple((_to(math.sqrt(area / r), multiple), _to(math.sqrt(area * r), multiple)) for r in ratios)


def nearest(buckets: Sequence[Size], shape: Size) -> Size:
    """The bucket of the nearest aspect ratio; among equal ones that of the nearest area, then the first."""

    def distance(size: Size) -> tuple[float, float]:
        ratio = math.log(size[1] / size[0]) - math.log(shape[1] / shape[0])
        return round(abs(ratio), 9), abs(math.log(size[0] * size[1]) - math.log(shape[0] * shape[1]))

    return min(buckets, key=distance)


def stretched(image: Tensor, size: Size) -> Tensor:
    """`3 H W` at `size`. Nothing is cut off, so that what compares the drawn picture with its source, each point with
    the same point, goes on doing so."""
    if tuple(image.shape[1:]) == size:
        return image
    resized: Tensor = interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    return resized.clamp(0, 1)


def _to(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple
