"""What a frozen vision network sees at each place of a picture, and how different two pictures are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from velatura.api import Context, VelaturaError
from velatura.rewards import lite0
from velatura.rewards.pretrained import opened

CARD = 8
"""The test card has this many coloured fields along each side."""


class Backbone:
    """Features by place of any vision model that transformers opens: ViT, DINOv2, Swin, ConvNeXt, ResNet; or Lite0's.

    Pictures are stretched to a square, so that the margins count, and normalised as the model was trained.
    """

    _see: Callable[[Tensor], Tensor]
    _patch: int | None

    def __init__(self, user: str, path: str, size: int | None, place: torch.device, context: Context) -> None:
        """`user`: the component, for messages; `size`: pixels of the square, None for what the model was trained on.

        Raises:
            VelaturaError: the model is not there, or has no features by place.
        """
        self._user, self._path, self._patch = user, path, None
        if path == lite0.NAME:
            self._see = lite0.Lite0(user, place)
            self.size, self._mean, self._std = size or lite0.SIZE, _column(lite0.MEAN), _column(lite0.STD)
        else:
            self._open(size, place, context)
        self.unit = self._unit()
        """Mean distance of unrelated places of a test card: what "entirely different" means to this network."""

    def _open(self, size: int | None, place: torch.device, context: Context) -> None:
        """A model of transformers."""
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        user, path = self._user, self._path
        config = opened(user, AutoConfig, path, context)
        eye = getattr(config, "vision_config", config)
        pictures = opened(user, AutoImageProcessor, path, context, "preprocessing", backend="pil")
        model = opened(user, AutoModel, path, context)
        model = getattr(model, "vision_model", model)
        network: Any = model.to(place).requires_grad_(False).train(False)

        def see(pixels: Tensor) -> Tensor:
            return self._map(network(pixel_values=pixels.to(network.device, network.dtype)).last_hidden_state)

        self._see = see
        self.size = size or _number(getattr(eye, "image_size", None)) or 224
        self._mean, self._std = _column(pictures.image_mean), _column(pictures.image_std)
        self._patch = _number(getattr(eye, "patch_size", None))
        if self._patch is not None and self.size % self._patch:
            raise VelaturaError(
                f"'{user}': {path!r} sees patches of {self._patch} pixels, and {self.size} is no multiple of that. "
                f"Set 'size', for example to {self._patch * max(1, self.size // self._patch)}."
            )

    def features(self, images: Sequence[Tensor]) -> Tensor:
        """[B C h w] fp32 on the CPU, of length 1 along C, of B pictures [3 H W] in [0, 1]."""
        square = (self.size, self.size)
        pixels = torch.cat([
            interpolate(image.detach().float().cpu()[None], square, mode="bicubic", antialias=True).clamp(0, 1)
            for image in images
        ])  # fmt: skip
        pixels = (pixels - self._mean) / self._std
        with torch.no_grad():
            return normalize(self._see(pixels).float().cpu(), dim=1)

    def _map(self, seen: Tensor) -> Tensor:
        """[B C h w] of a map, or of tokens [B N C] after those that stand for no place (class, registers).

        Raises:
            VelaturaError: the tokens are no square.
        """
        if seen.ndim == 4:
            return seen
        side = self.size // self._patch if self._patch is not None else 0
        if self._patch is None or seen.shape[1] < side * side:
            side = int(seen.shape[1] ** 0.5)  # networks that halve the map, like Swin
        if side * side > seen.shape[1] or seen.shape[1] - side * side > 16:
            raise VelaturaError(
                f"'{self._user}': {self._path!r} gives {seen.shape[1]} features, which are no square of places. Use a "
                "vision transformer or a convolutional network."
            )
        places: Tensor = seen[:, seen.shape[1] - side * side :]
        return places.mT.reshape(len(seen), -1, side, side)

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """[h w] (1 - cosine) of two feature maps [C h w], in units of entirely different places."""
        return (1 - (one * other).sum(0)).clamp_min(0) / self.unit

    def _unit(self) -> float:
        """From every two places of a card of random colours, smooth in half of its fields."""
        generator = torch.Generator().manual_seed(0)
        fields = torch.rand(3, CARD, CARD, generator=generator)
        card = interpolate(fields[None], (self.size, self.size), mode="nearest")[0]
        grain = torch.rand(3, self.size, self.size, generator=generator) - 0.5
        card[:, :, self.size // 2 :] += 0.5 * grain[:, :, self.size // 2 :]
        places = self.features([card.clamp(0, 1)])[0].flatten(1)
        count = places.shape[1]
        mean = float((1 - places.T @ places).sum()) / max(1, count * (count - 1))
        if not mean > 1e-6:
            raise VelaturaError(f"'{self._user}': {self._path!r} sees no difference between places of a test card.")
        return mean


def _column(values: Sequence[float]) -> Tensor:
    """[3 1 1]."""
    return torch.tensor(list(values)).view(3, 1, 1)


def _number(value: Any) -> int | None:
    """A size that configurations give as a number or as two equal ones."""
    if isinstance(value, list | tuple):
        value = value[0] if len(set(value)) == 1 else None
    return int(value) if isinstance(value, int) else None
