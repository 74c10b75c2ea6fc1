"""Qwen-Image 2.1: one transformer that draws from text and edits, behind the shared prefix of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from velatura.api import Conditioning, Prompt
from velatura.plugins.adapters.conditioning import Row
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions
from velatura.plugins.adapters.pictures import from_signed, to_pil, to_signed
from velatura.plugins.adapters.qwen_image_21_network import (
    Grid,
    Layout,
    QwenImage21Conditioning,
    prepare,
    velocity,
)
from velatura.plugins.adapters.sizes import Size, sides

PIXELS = 16
"""Sides of a latent token in pixels."""


class QwenImage21Options(DiffusersOptions):
    """Options of `qwen-image-21`."""

    source_area: int | None = Field(
        None, ge=1024, description="Pixels that source images are resized to; null is width x height of the picture."
    )


class QwenImage21(DiffusersAdapter[QwenImage21Options]):
    """Qwen-Image 2.1, text to image and edits with any number of source images.

    Latents are [B h*w C], a token per 16 x 16 pixels. Guidance is null + scale (cond - null), without a rescale.
    """

    name = "qwen-image-21"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImage21Pipeline",)
    sources = None
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "processor")
    multiple = 2 * PIXELS

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """The last hidden states of the text encoder, which sees the sources, and the sources' latents."""
        with self.on_device("text_encoder", "vae"):
            images = [self._source(image) for image in prompt.sources] or None
            embeds, _, slots = self.pipe.encode_prompt(text, image=images, device=self.device)
            row = {"text": embeds[0], "slots": slots[0]}
            if images is not None:
                row["sources"] = torch.cat([self._encode_source(image) for image in images])
            return row

    def collate(self, layout: tuple[Any, ...], rows: Sequence[Row]) -> Conditioning:
        """Texts padded to the longest; positions of image slots are those of the template, equal in all rows."""
        length = torch.tensor([len(row["text"]) for row in rows])
        longest = int(length.max())
        text = torch.nn.utils.rnn.pad_sequence([row["text"] for row in rows], batch_first=True)
        first = rows[int(length.argmax())]["slots"].bool().tolist()
        size, *sources = layout
        grids = tuple(_grid(self._source_size(*source)) for source in sources)
        return QwenImage21Conditioning.of(
            text,
            Layout(slots=tuple(first), sources=grids, target=_grid(size)),
            mask=torch.arange(longest) < length[:, None],
            sources=torch.stack([row["sources"] for row in rows]) if grids else None,
        )

    def prepare(self, net: nn.Module, cond: Conditioning) -> Conditioning:
        """`cond` with the keys and values of its distinct rows; with gradient where gradients are enabled."""
        return prepare(net, cast("QwenImage21Conditioning", cond))

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N h*w C] at x [N h*w C], t [N]."""
        return velocity(net, x, t * 1000 / 1000, cast("QwenImage21Conditioning", cond), rows)

    def compiles(self, told: Mapping[str, Any]) -> bool:
        """Not a prompt's prefix: each has its own segments, so that each would be compiled anew, for one forward."""
        return told.get("kv_cache_mode") == "cached"

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """[1 C h w]: a video of one frame."""
        return (1, self._channels, size[0] // PIXELS, size[1] // PIXELS)

    def pack(self, x: Tensor, size: Size) -> Tensor:
        """[B 1 C h w] to [B h*w C]."""
        return x.flatten(-2).squeeze(1).transpose(1, 2)

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B h*w C] to images [B 3 H W]; what the model left transparent lies on white."""
        height, width = self.size_of(prompt)
        z = x.transpose(1, 2).reshape(len(x), -1, 1, height // PIXELS, width // PIXELS)
        with torch.no_grad(), self.on_device("vae") as vae:
            mean, std = self._statistics(vae, z.device)
            return from_signed(vae.decode((z.to(vae.dtype) * std + mean).to(vae.dtype)).sample[:, :, 0])

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B h*w C]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            mean, std = self._statistics(vae, vae.device)
            pixels = to_signed(images, 4).unsqueeze(2).to(vae.device, vae.dtype)
            z: Tensor = (vae.encode(pixels).latent_dist.mode() - mean) / std
            return z[:, :, 0].flatten(2).transpose(1, 2).float().to(images.device)

    def _statistics(self, vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents' channels, each [1 C 1 1 1]."""
        kind = {"device": device, "dtype": vae.dtype}
        mean, std = vae.config.latents_mean, vae.config.latents_std
        return tuple(torch.tensor(value, **kind).reshape(1, -1, 1, 1, 1) for value in (mean, std))  # type: ignore[return-value]

    @property
    def _channels(self) -> int:
        return int(self.folder.config("transformer")["in_channels"])

    def _source_size(self, height: int, width: int) -> Size:
        """A source's height and width after resizing."""
        area = self.options.source_area or self.options.height * self.options.width
        across, down = sides(area, width / height)
        return down, across

    def _source(self, image: Tensor) -> Image.Image:
        height, width = self._source_size(*image.shape[1:])
        return cast("Image.Image", self.pipe.image_processor.resize(to_pil(image).convert("RGBA"), height, width))

    def _encode_source(self, image: Image.Image) -> Tensor:
        """[h*w C]."""
        pixels = self.pipe.image_processor.preprocess(image).unsqueeze(2).to(self.device, self.dtype)
        return cast("Tensor", self.pipe._encode_vae_image(pixels, None)[0, :, 0].flatten(1).T)


def _grid(size: Size) -> Grid:
    return Grid(1, size[0] // PIXELS, size[1] // PIXELS)
