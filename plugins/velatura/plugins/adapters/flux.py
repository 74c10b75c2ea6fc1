"""FLUX.1: dev, schnell, and Kontext, which edits one source image."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from velatura.api import Conditioning, Prompt, VelaturaError
from velatura.plugins.adapters.conditioning import Row, RowsConditioning
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions
from velatura.plugins.adapters.lora import unwrap
from velatura.plugins.adapters.pictures import from_signed, to_pil, to_signed
from velatura.plugins.adapters.sizes import Size
from velatura.plugins.adapters.sources import called

KONTEXT = "FluxKontextPipeline"
"""The pipeline class that edits."""


class FluxOptions(DiffusersOptions):
    """Options of `flux`."""

    embedded_guidance: float = Field(
        3.5, ge=0, description="Guidance scale that a guidance-distilled network (dev, Kontext) is told as a number."
    )
    true_cfg: bool = Field(
        False, description="Allow guidance with an unconditional branch, `negative_prompt`, at a second forward a step."
    )
    text_tokens: int = Field(
        512, ge=1, le=512, description="Length that prompts are padded or cut to for T5; schnell was trained with 256."
    )
    source_sizes: tuple[Size, ...] | None = Field(
        None,
        description="Heights and widths of which a source image gets the one nearest in shape; null: those that "
        "Kontext was trained on; an empty list: its own size.",
    )


class Flux(DiffusersAdapter[FluxOptions]):
    """FLUX.1 text to image, and with Kontext also edits of one source image.

    Latents are [B h*w 4C], a token per 2 x 2 pixels of the autoencoder's latents. Guidance, where `true_cfg` allows
    it, is null + scale (cond - null).
    """

    name = "flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline", KONTEXT)
    beside_rows: ClassVar[tuple[str, ...]] = ("embedded_guidance", "true_cfg", "height", "width")
    sources = 1
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")

    @cached_property
    def multiple(self) -> int:
        """Sides of a token in pixels."""
        return 2 * self._scale

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """T5's states `text` [L D], CLIP's pooled state `pooled` [D'], and the latents of the source [h*w 4C]."""
        with self.on_device(*self.encoders):
            states, pooled, _ = self.pipe.encode_prompt(
                text, device=self.device, max_sequence_length=self.options.text_tokens
            )
        row = {"text": states[0], "pooled": pooled[0]}
        if prompt.sources:
            with self.on_device("vae"):
                row["source"] = self._encode_source(prompt.sources[0])
        return row

    def check_guided(self) -> None:
        """Only `true_cfg` makes an unconditional branch.

        Raises:
            VelaturaError: guidance is asked of a network that is distilled to do without.
        """
        if not self.options.true_cfg:
            raise VelaturaError(
                f"A guidance scale other than 1 was asked of {self.folder.path}, and FLUX.1 models are distilled: they "
                "are not trained to draw without a prompt. Set guidance to `none` (dev and Kontext take their scale "
                "from the adapter's `embedded_guidance`), or set the adapter's `true_cfg: true` for an unconditional "
                "branch with `negative_prompt`, at twice the cost."
            )

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N h*w 4C] at x [N h*w 4C], t [N]."""
        rows_cond = cast("RowsConditioning", cond)
        told, _ = rows_cond.take(rows)
        network = unwrap(net)
        dtype = network.dtype
        tokens = x.to(dtype)
        if "source" in told:
            tokens = torch.cat([tokens, told["source"].to(dtype)], dim=1)
        scale = torch.full_like(t, self.options.embedded_guidance) if network.config.guidance_embeds else None
        predicted = net(
            hidden_states=tokens,
            timestep=(t * 1000).to(dtype) / 1000,
            guidance=scale,
            pooled_projections=told["pooled"].to(dtype),
            encoder_hidden_states=told["text"].to(dtype),
            txt_ids=torch.zeros(told["text"].shape[1], 3, device=x.device),
            img_ids=self._positions(cast("tuple[Size, ...]", rows_cond.layout), x.device),
            return_dict=False,
        )[0]
        return cast("Tensor", predicted[:, : x.shape[1]].float())

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """[C 2h 2w]."""
        channels = int(self.folder.config("transformer")["in_channels"]) // 4
        return (channels, size[0] // self._scale, size[1] // self._scale)

    def pack(self, x: Tensor, size: Size) -> Tensor:
        """[B C 2h 2w] to [B h*w 4C]."""
        return _pack(x)

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B h*w 4C] to images [B 3 H W]."""
        height, width = (side // self.multiple for side in self.size_of(prompt))
        with torch.no_grad(), self.on_device("vae") as vae:
            z = pixel_shuffle(x.to(vae.dtype).transpose(1, 2).reshape(len(x), -1, height, width), 2)
            z = z / vae.config.scaling_factor + vae.config.shift_factor
            return from_signed(vae.decode(z, return_dict=False)[0])

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B h*w 4C]."""
        with torch.no_grad(), self.on_device("vae"):
            return self._encode(to_signed(images)).float()

    def check_sources(self, prompt: Prompt) -> None:
        """Only Kontext edits.

        Raises:
            VelaturaError: another model is given a source image, or Kontext more than one.
        """
        if prompt.sources and self.folder.pipeline_class != KONTEXT:
            raise VelaturaError(
                f"{called(prompt)} has {len(prompt.sources)} source image(s), but {self.folder.path} is a "
                f"{self.folder.pipeline_class}, which only draws from text. Take a Kontext model ({KONTEXT}), or leave "
                "`sources` out."
            )
        super().check_sources(prompt)

    @cached_property
    def _scale(self) -> int:
        """Sides of the autoencoder's latents in pixels."""
        return int(2 ** (len(self.folder.config("vae")["block_out_channels"]) - 1))

    def _positions(self, layout: tuple[Size, ...], device: torch.device) -> Tensor:
        """[tokens 3]: which picture (0 is the one drawn), row and column of every token."""
        size, *sources = layout
        grids = [size, *(self._source_size(*source) for source in sources)]
        tokens = [(height // self.multiple, width // self.multiple) for height, width in grids]
        return torch.cat([_grid(picture, *sides, device) for picture, sides in enumerate(tokens)])

    def _source_size(self, height: int, width: int) -> Size:
        """A source's height and width after resizing."""
        sizes = self.options.source_sizes
        if sizes is None:
            sizes = _trained_sizes()
        if sizes:
            _, width, height = min((abs(width / height - w / h), w, h) for h, w in sizes)
        return height // self.multiple * self.multiple, width // self.multiple * self.multiple

    def _encode_source(self, image: Tensor) -> Tensor:
        """[3 H W] to [h*w 4C]."""
        processor = self.pipe.image_processor
        height, width = self._source_size(*image.shape[1:])
        resized = processor.resize(to_pil(image), height, width)
        return self._encode(processor.preprocess(resized, height, width))[0]

    def _encode(self, pixels: Tensor) -> Tensor:
        """[B 3 H W] in [-1, 1] to [B h*w 4C]; the autoencoder is on the device."""
        vae = self.pipe.vae
        z = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        return _pack((z - vae.config.shift_factor) * vae.config.scaling_factor)


def _pack(z: Tensor) -> Tensor:
    """[B C 2h 2w] to [B h*w 4C]."""
    return pixel_unshuffle(z, 2).flatten(2).transpose(1, 2).contiguous()


def _grid(picture: int, height: int, width: int, device: torch.device) -> Tensor:
    """[height*width 3]."""
    axes = (
        torch.arange(start, start + count, device=device) for start, count in ((picture, 1), (0, height), (0, width))
    )
    return torch.cartesian_prod(*axes).float()


def _trained_sizes() -> tuple[Size, ...]:
    """Heights and widths of the sources that Kontext was trained on, as diffusers lists them."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    return tuple((height, width) for width, height in PREFERRED_KONTEXT_RESOLUTIONS)
