"""Pictures as a judge takes them."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_picture(image: Tensor, max_pixels: int | None) -> Image.Image:
    """`3 H W` in [0, 1] as 8-bit RGB, at most `max_pixels` of them.

    Raises:
        ValueError: it is no picture.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"the picture has shape {list(image.shape)} instead of 3 x height x width")
    if not bool(torch.isfinite(image).all()):
        raise ValueError("the picture holds values that are not finite")
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    if max_pixels is None or picture.width * picture.height <= max_pixels:
        return picture
    scale = math.sqrt(max_pixels / (picture.width * picture.height))
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def data_url(picture: Image.Image) -> str:
    """A picture as a lossless PNG in an address of its own."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
