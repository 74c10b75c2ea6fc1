"""The autoencoder of the world: a fixed principal component basis of square patches, of 6 or of 4 pixels a side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from velatura.plugins.tinyworld.task import TinyWorldOptions, WorldPrompts

PIXELS = 24
CHANNELS = 48
FILES = {6: Path(__file__).with_name("vae.safetensors"), 4: Path(__file__).with_name("vae-4.safetensors")}
"""Pixels of a patch's side -> the basis that ships: 6 makes 16 tokens of a picture, 4 makes 36 and loses nothing."""


class PcaVae(nn.Module):
    """Pictures [B, 3, 24, 24] to latents [B, T, 48] and back: one token per patch of p x p pixels, row-major.

    z = (patch - mean) basis / scale, T = (24 / p)^2. The scale is the square root of a component's deviation, up to one
    factor that gives latents an overall deviation of 1: strong components stay stronger than weak ones, by less than
    in pixels.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        """Mean [3 p^2], orthonormal basis [3 p^2, 48], scale [48]."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self.register_buffer("scale", scale)

    @property
    def patch(self) -> int:
        """Pixels of a patch's side, p."""
        return math.isqrt(len(self.mean) // 3)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, 24, 24] in [0, 1] to [B, T, 48]."""
        return (patches(images.float(), self.patch) - self.mean) @ self.basis / self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, T, 48] to [B, 3, 24, 24], clamped to [0, 1]."""
        flat = (latents.float() * self.scale) @ self.basis.T + self.mean
        return unpatch(flat, self.patch).clamp(0, 1)


def patches(images: Tensor, patch: int = 6) -> Tensor:
    """[B, 3, 24, 24] to [B, T, 3 p^2]."""
    grid = PIXELS // patch
    blocks = images.reshape(len(images), 3, grid, patch, grid, patch)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(len(images), grid * grid, 3 * patch * patch)


def unpatch(flat: Tensor, patch: int = 6) -> Tensor:
    """[B, T, 3 p^2] to [B, 3, 24, 24]."""
    grid = PIXELS // patch
    blocks = flat.reshape(len(flat), grid, grid, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(len(flat), 3, PIXELS, PIXELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted autoencoder and how much it keeps."""

    vae: PcaVae
    retained: float
    """Share of the variance of held-in patches that survives, in [0, 1]."""


def fit(count: int = 20_000, patch: int = 6) -> Fit:
    """Fit the basis to `count` clean train pictures of both tasks; no randomness but theirs."""
    options = TinyWorldOptions(task="both", count=count, targets=True, wrong_captions=0, degraded=0)
    targets = [prompt.target for prompt in WorldPrompts(options, "train") if prompt.target is not None]
    flat = patches(torch.stack(targets), patch).reshape(-1, 3 * patch * patch).double()
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov((flat - mean).numpy(), rowvar=False))
    kept = values[::-1][:CHANNELS].copy()
    basis = vectors[:, ::-1][:, :CHANNELS].copy()
    basis *= np.sign(basis[np.abs(basis).argmax(0), np.arange(CHANNELS)])  # eigenvectors have no sign of their own
    scale = kept**0.25 * np.sqrt(np.sqrt(kept).mean())
    vae = PcaVae(mean.float(), torch.from_numpy(basis).float(), torch.from_numpy(scale).float())
    return Fit(vae=vae, retained=float(kept.sum() / values.sum()))


def save(vae: PcaVae, path: Path) -> None:
    """Write the basis as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, path)


def load_vae(patch: int = 6) -> PcaVae:
    """A fresh copy of the autoencoder that ships with the world for patches of that side, 6 or 4 pixels."""
    tensors = _tensors(patch)
    return PcaVae(*(tensors[name].clone() for name in ("mean", "basis", "scale")))


@cache
def _tensors(patch: int) -> dict[str, Tensor]:
    return load_file(FILES[patch])
