"""FLUX.2: dev, which is guidance-distilled, and klein; both draw from text and edit any number of source images."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from velatura.api import Conditioning, Prompt, VelaturaError
from velatura.plugins.adapters.conditioning import Row, RowsConditioning
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions
from velatura.plugins.adapters.lora import ATTENTION, unwrap
from velatura.plugins.adapters.model_folder import one_by_one
from velatura.plugins.adapters.pictures import from_signed, to_pil, to_signed
from velatura.plugins.adapters.quiet import without_bars
from velatura.plugins.adapters.sizes import Size

KLEIN = "Flux2KleinPipeline"
"""The pipeline class whose undistilled models are guided by a second forward."""
SPACING = 10
"""Between the first coordinates of the pictures: 0 for the one drawn, then 10, 20 and so on for the sources."""


class Flux2Options(DiffusersOptions):
    """Options of `flux2`."""

    embedded_guidance: float = Field(
        4.0, ge=0, description="Guidance scale that a guidance-distilled network (dev) is told as a number."
    )
    text_tokens: int = Field(512, ge=1, description="Length that prompts, in their template, are padded or cut to.")
    source_area: int = Field(
        1024 * 1024,
        ge=64 * 64,
        description="Source images of more pixels are made this large; others stay as they are.",
    )
    lora_targets: tuple[str, ...] = Field(
        (*ATTENTION, "to_qkv_mlp_proj"), min_length=1, description="Linear layers that LoRA is added to."
    )


class Flux2(DiffusersAdapter[Flux2Options]):
    """FLUX.2 dev and klein, text to image and edits.

    Latents are [B h*w 4C], a token per 2 x 2 pixels of the autoencoder's latents, normalised per channel. Guidance,
    which only klein's undistilled models have, is null + scale (cond - null).
    """

    name = "flux2"
    pipelines: ClassVar[tuple[str, ...]] = ("Flux2Pipeline", KLEIN)
    beside_rows: ClassVar[tuple[str, ...]] = ("embedded_guidance", "height", "width")
    sources = None

    @cached_property
    def multiple(self) -> int:
        """Sides of a token in pixels."""
        return int(2 ** len(self.folder.config("vae")["block_out_channels"]))

    @cached_property
    def pipe(self) -> Any:
        """The stock pipeline without its transformer, on the CPU; prompts are text, so that a tokenizer does."""
        if self.folder.index["tokenizer"][1] != "PixtralProcessor":
            return self.folder.pipeline(self.dtype)
        return _text_only(self.folder.path, self.folder.pipeline_class, self.dtype)

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """States of three layers of the text encoder `text` [L 3D], and all sources' latents `sources` [S 4C]."""
        with self.on_device("text_encoder"):
            states, _ = self.pipe.encode_prompt(text, device=self.device, max_sequence_length=self.options.text_tokens)
        row = {"text": states[0]}
        if prompt.sources:
            with self.on_device("vae"):
                row["sources"] = torch.cat([self._encode_source(prompt, image) for image in prompt.sources])
        return row

    def check_guided(self) -> None:
        """Only undistilled klein models have an unconditional branch.

        Raises:
            VelaturaError: guidance is asked of a network that is distilled to do without.
        """
        kind = self.folder.pipeline_class
        if kind == KLEIN and not self.folder.index.get("is_distilled", False):
            return
        why = "that is what makes it fast" if kind == KLEIN else "its scale is the adapter's `embedded_guidance`"
        raise VelaturaError(
            f"A guidance scale other than 1 was asked of {self.folder.path}, a distilled {kind}: it has no "
            f"unconditional branch ({why}). Set guidance to `none`, or take an undistilled klein model."
        )

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N h*w 4C] at x [N h*w 4C], t [N]."""
        rows_cond = cast("RowsConditioning", cond)
        told, _ = rows_cond.take(rows)
        network = unwrap(net)
        dtype = network.dtype
        tokens = x.to(dtype)
        if "sources" in told:
            tokens = torch.cat([tokens, told["sources"].to(dtype)], dim=1)
        scale = torch.full_like(t, self.options.embedded_guidance) if network.config.guidance_embeds else None
        predicted = net(
            hidden_states=tokens,
            timestep=(t * 1000).to(dtype) / 1000,
            guidance=scale,
            encoder_hidden_states=told["text"].to(dtype),
            txt_ids=_grid(0, (1, 1), x.device, layers=told["text"].shape[1]),
            img_ids=self._positions(cast("tuple[Size, ...]", rows_cond.layout), x.device),
            return_dict=False,
        )[0]
        return cast("Tensor", predicted[:, : x.shape[1]].float())

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """[4C h w]: noise is drawn per token."""
        channels = int(self.folder.config("transformer")["in_channels"])
        return (channels, size[0] // self.multiple, size[1] // self.multiple)

    def pack(self, x: Tensor, size: Size) -> Tensor:
        """[B 4C h w] to [B h*w 4C]."""
        return x.flatten(2).transpose(1, 2)

    def set_times(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Linearly spaced sigmas, shifted by a fit over the numbers of tokens and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B h*w 4C] to images [B 3 H W]."""
        height, width = (side // self.multiple for side in self.size_of(prompt))
        with torch.no_grad(), self.on_device("vae") as vae:
            mean, std = _statistics(vae)
            z = x.to(vae.dtype).transpose(1, 2).reshape(len(x), -1, height, width) * std + mean
            return from_signed(vae.decode(pixel_shuffle(z, 2), return_dict=False)[0])

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B h*w 4C]."""
        with torch.no_grad(), self.on_device("vae"):
            return self._encode(to_signed(images)).float()

    def _positions(self, layout: tuple[Size, ...], device: torch.device) -> Tensor:
        """[tokens 4]: picture, row, column and layer of every token."""
        size, *sources = layout
        pictures = [size, *(self._source_size(*self._shrunk(*source)) for source in sources)]
        return torch.cat([
            _grid(SPACING * i, (height // self.multiple, width // self.multiple), device)
            for i, (height, width) in enumerate(pictures)
        ])  # fmt: skip

    def _shrunk(self, height: int, width: int) -> Size:
        """A source's height and width with at most `source_area` pixels."""
        if height * width <= self.options.source_area:
            return height, width
        scale = math.sqrt(self.options.source_area / (width * height))
        return int(height * scale), int(width * scale)

    def _source_size(self, height: int, width: int) -> Size:
        """What is left of a source after cutting its edges."""
        return height // self.multiple * self.multiple, width // self.multiple * self.multiple

    def _encode_source(self, prompt: Prompt, source: Tensor) -> Tensor:
        """[3 H W] to [h*w 4C]."""
        processor, image = self.pipe.image_processor, to_pil(source)
        try:
            processor.check_image_input(image)
        except ValueError as error:
            raise VelaturaError(
                f"A source image of prompt {prompt.id!r} is of no use to '{self.name}'. {error}"
            ) from error
        height, width = self._shrunk(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        height, width = self._source_size(height, width)
        return self._encode(processor.preprocess(image, height=height, width=width, resize_mode="crop"))[0]

    def _encode(self, pixels: Tensor) -> Tensor:
        """[B 3 H W] in [-1, 1] to [B h*w 4C]; the autoencoder is on the device."""
        vae = self.pipe.vae
        mean, std = _statistics(vae)
        z = pixel_unshuffle(vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode(), 2)
        return ((z - mean) / std).flatten(2).transpose(1, 2)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the tokens' channels, each [1 4C 1 1]."""
    variance = vae.bn.running_var.reshape(1, -1, 1, 1)
    std = torch.sqrt(variance + vae.config.batch_norm_eps)
    return vae.bn.running_mean.reshape(1, -1, 1, 1).to(vae.dtype), std.to(vae.dtype)


def _grid(picture: int, sides: Size, device: torch.device, *, layers: int = 1) -> Tensor:
    """[height*width*layers 4]."""
    spans = ((picture, 1), (0, sides[0]), (0, sides[1]), (0, layers))
    return torch.cartesian_prod(*(torch.arange(start, start + count, device=device) for start, count in spans))


def _text_only(folder: Path, pipeline: str, dtype: torch.dtype) -> Any:
    """A stock pipeline whose processor, which needs torchvision for pictures, is replaced by its tokenizer."""
    import diffusers
    from transformers import AutoTokenizer

    with without_bars():
        found: Any = getattr(diffusers, pipeline)
        pipe = found.from_pretrained(folder, dtype=dtype, local_files_only=True, transformer=None, tokenizer=None)
    pipe.register_modules(tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.text_encoder, pipe.vae):
        one_by_one(part.requires_grad_(False).train(False))
    return pipe
