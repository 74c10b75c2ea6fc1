"""Colours as eyes compare them: OKLab, in which equal distances look about equally large (Ottosson 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONES = ((0.4122214708, 0.5363325363, 0.0514459929),
         (0.2119034982, 0.6806995451, 0.1073969566),
         (0.0883024619, 0.2817188376, 0.6299787005))  # fmt: skip
"""Linear sRGB to the responses of three cones."""
OPPONENTS = ((0.2104542553, 0.7936177850, -0.0040720468),
             (1.9779984951, -2.4285922050, 0.4505937099),
             (0.0259040371, 0.7827717662, -0.8086757660))  # fmt: skip
"""Cube roots of those to lightness, green-red and blue-yellow."""


def oklab(image: Tensor) -> Tensor:
    """[3 H W] sRGB in [0, 1] to [H*W 3]: lightness in [0, 1], and two axes of colour within about ±0.4."""
    encoded = image.detach().float().flatten(1).clamp(0, 1)
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    cones = torch.tensor(CONES).to(linear) @ linear
    return (torch.tensor(OPPONENTS).to(linear) @ cones.clamp_min(0).pow(1 / 3)).T


def parsed(colours: Sequence[str]) -> Tensor:
    """[N 3] OKLab of colours as CSS writes them: `gold`, `#1f3a5f`, `oklch(0.7 0.15 200)`.

    Raises:
        ValueError: one of them is no colour.
    """
    from coloraide import Color

    found = []
    for colour in colours:
        if Color.match(colour, fullmatch=True) is None:
            raise ValueError(f"{colour!r} is no colour. Write a name of CSS, like gold, or a code, like '#1f3a5f'")
        found.append(Color(colour).convert("oklab").coords(nans=False))
    return torch.tensor(found, dtype=torch.float32)
