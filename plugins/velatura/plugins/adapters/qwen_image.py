"""Qwen-Image: text to image. The functions on latents are also those of the models that edit in the same space."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Generic, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from velatura.api import Conditioning, Prompt
from velatura.plugins.adapters.conditioning import Row, RowsConditioning
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions, O
from velatura.plugins.adapters.lora import unwrap
from velatura.plugins.adapters.model_folder import ModelFolder
from velatura.plugins.adapters.pictures import from_signed, to_signed
from velatura.plugins.adapters.sizes import Size

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image's tokens."""


class QwenImageOptions(DiffusersOptions):
    """Options of `qwen-image`."""

    negative_prompt: str = Field(" ", description="The text of the unconditional branch; the model card has a space.")
    text_tokens: int = Field(512, ge=1, le=1024, description="Longer prompts are cut to this many tokens.")


class QwenImageLatents(DiffusersAdapter[O], Generic[O]):
    """What the models that draw in Qwen-Image's latents share: sizes, packing, autoencoder and guidance rule."""

    @cached_property
    def multiple(self) -> int:
        """Side of a token in pixels."""
        return token_pixels(self.folder)

    def guide(self, cond: Tensor, null: Tensor, scale: Tensor) -> Tensor:
        """null + scale (cond - null), each token as long as in cond."""
        return as_long_as(cond, super().guide(cond, null, scale))

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """[1 C h w]: a video of one frame."""
        return latent_shape(self.folder, size)

    def pack(self, x: Tensor, size: Size) -> Tensor:
        """[B 1 C h w] to [B h/2*w/2 4C]."""
        return pack(x)

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B h*w 4C] to images [B 3 H W]."""
        _, rows, columns = grid(self.size_of(prompt), self.multiple)
        with torch.no_grad(), self.on_device("vae") as vae:
            return decode(vae, x, rows, columns)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B h*w 4C]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            return encode(vae, to_signed(images)).float()


class QwenImage(QwenImageLatents[QwenImageOptions]):
    """Qwen-Image, text to image.

    Latents are [B h*w 4C], a token per 2 x 2 latent pixels. Guidance is null + scale (cond - null), each token of it
    rescaled to the length it has in cond.
    """

    name = "qwen-image"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    beside_rows: ClassVar[tuple[str, ...]] = ("height", "width")
    ragged: ClassVar[tuple[str, ...]] = ("text",)
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """The last hidden states [L D] of the text encoder behind the template's opening."""
        with self.on_device("text_encoder"):
            embeds, _ = self.pipe.encode_prompt(text, device=self.device, max_sequence_length=self.options.text_tokens)
            return {"text": embeds[0]}

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N h*w 4C] at x [N h*w 4C], t [N]."""
        told = cast("RowsConditioning", cond)
        size, *_ = cast("tuple[Size, ...]", told.layout)
        return token_velocity(net, x, t, told, rows, (grid(size, self.multiple),))


# Qwen-Image's latents, for every family that shares them


def token_pixels(folder: ModelFolder) -> int:
    """Side of a token in pixels: the autoencoder halves the sides that often, and a token is 2 x 2 of its pixels."""
    return int(2 * 2 ** len(folder.config("vae")["temperal_downsample"]))


def latent_shape(folder: ModelFolder, size: Size) -> tuple[int, ...]:
    """[1 C h w] of the noise for a picture of `size`."""
    per_side = token_pixels(folder) // 2
    channels = int(folder.config("transformer")["in_channels"]) // 4
    return (1, channels, size[0] // per_side, size[1] // per_side)


def grid(size: Size, pixels: int) -> Grid:
    """How a picture of `size` is counted in tokens of `pixels` pixels a side."""
    return 1, size[0] // pixels, size[1] // pixels


def pack(x: Tensor) -> Tensor:
    """[B C h w], with one axis of length 1 before or behind C, to [B h/2*w/2 4C]."""
    flat = x.reshape(len(x), -1, *x.shape[-2:])
    return pixel_unshuffle(flat, 2).flatten(2).transpose(1, 2)


def token_velocity(
    net: nn.Module, x: Tensor, t: Tensor, told: RowsConditioning, rows: Tensor, grids: tuple[Grid, ...]
) -> Tensor:
    """dx/dt [N L C] at x [N L C], t [N]; `grids` are those of the target and of the sources in the row `sources`."""
    dtype = unwrap(net).dtype
    tensors, masks = told.take(rows)
    hidden = torch.cat([x.to(dtype), tensors["sources"].to(dtype)], 1) if "sources" in tensors else x.to(dtype)
    out: Tensor = net(
        hidden_states=hidden,
        timestep=t * 1000 / 1000,
        encoder_hidden_states=tensors["text"].to(dtype),
        encoder_hidden_states_mask=masks["text"],
        img_shapes=[list(grids)] * len(x),
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]].float()


def as_long_as(cond: Tensor, guided: Tensor) -> Tensor:
    """`guided` [N L C] with every token rescaled to its Euclidean length in `cond`."""
    wanted, found = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (cond, guided))
    scaled: Tensor = guided * (wanted / found)
    return scaled


def encode(vae: Any, signed: Tensor) -> Tensor:
    """Images [B 3 H W] in [-1, 1] to latents [B h*w 4C], normalised per channel."""
    mean, std = _statistics(vae)
    z = vae.encode(signed.unsqueeze(2).to(vae.device, vae.dtype)).latent_dist.mode()
    return pack((z - mean) / std)


def decode(vae: Any, x: Tensor, rows: int, columns: int) -> Tensor:
    """Latents [B rows*columns 4C] to images [B 3 H W] in [0, 1]; the inverse of `encode`."""
    mean, std = _statistics(vae)
    z = pixel_shuffle(x.transpose(1, 2).reshape(len(x), -1, rows, columns), 2).unsqueeze(2)
    return from_signed(vae.decode(z.to(vae.device, vae.dtype) * std + mean).sample[:, :, 0])


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents' channels, each [1 C 1 1 1]."""
    mean, std = (
        torch.tensor(numbers, device=vae.device, dtype=vae.dtype).reshape(1, -1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
