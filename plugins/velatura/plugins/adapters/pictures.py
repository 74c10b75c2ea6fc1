"""Between pictures of the framework, RGB in [0, 1], and what pipelines and autoencoders take."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """`3 H W` in [0, 1] to 8-bit RGB."""
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def to_signed(images: Tensor, channels: int = 3) -> Tensor:
    """[B 3 H W] in [0, 1] to [B channels H W] in [-1, 1]; a fourth channel is full opacity."""
    if channels == 4:
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    return images * 2 - 1


def from_signed(images: Tensor) -> Tensor:
    """[B 3 or 4 H W] in [-1, 1] to fp32 RGB in [0, 1]; what is transparent lies on white."""
    unit = (images.float() / 2 + 0.5).clamp(0, 1)
    if unit.shape[1] == 4:
        colour, opacity = unit[:, :3], unit[:, 3:]
        return colour * opacity + (1 - opacity)
    return unit
