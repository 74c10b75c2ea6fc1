"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5 where the folder has it, and spatial latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from velatura.api import Conditioning, Prompt, VelaturaError
from velatura.plugins.adapters.conditioning import Row, RowsConditioning
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions
from velatura.plugins.adapters.lora import unwrap
from velatura.plugins.adapters.pictures import from_signed, to_signed
from velatura.plugins.adapters.sizes import Size
from velatura.plugins.adapters.times import shift_of


class SD3Options(DiffusersOptions):
    """Options of `sd3`."""

    max_sequence_length: int = Field(256, ge=1, le=512, description="Tokens of a prompt that T5 sees.")


class SD3(DiffusersAdapter[SD3Options]):
    """Stable Diffusion 3 and 3.5, text to image.

    Latents are [B C h w], as the autoencoder writes them. Guidance is null + scale (cond - null).
    """

    name = "sd3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    beside_rows: ClassVar[tuple[str, ...]] = ("height", "width")
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def multiple(self) -> int:
        """The autoencoder's shrinking times the transformer's patch."""
        return self._shrink * self._patch

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """Hidden states of the three encoders [L D], and the pooled ones of the two CLIPs [P]."""
        present = [part for part in self.encoders if getattr(self.pipe, part) is not None]
        with self._width_of_text(), self.on_device(*present):
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                text, None, None, device=self.device, do_classifier_free_guidance=False,
                max_sequence_length=self.options.max_sequence_length,
            )  # fmt: skip
        return {"text": embeds[0], "pooled": pooled[0]}

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N C h w] at x [N C h w], t [N]."""
        told, _ = cast("RowsConditioning", cond).take(rows)
        dtype = unwrap(net).dtype
        (v,) = net(
            hidden_states=x.to(dtype),
            timestep=t * 1000,
            encoder_hidden_states=told["text"].to(dtype),
            pooled_projections=told["pooled"].to(dtype),
            return_dict=False,
        )
        return cast("Tensor", v.float())

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """[C h w]."""
        channels = int(self.folder.config("transformer")["in_channels"])
        return (channels, size[0] // self._shrink, size[1] // self._shrink)

    def size(self, prompt: Prompt) -> Size:
        """As for every family; its table of positions ends somewhere.

        Raises:
            VelaturaError: the picture is larger than that.
        """
        size = super().size(prompt)
        limit = int(self.folder.config("transformer")["pos_embed_max_size"]) * self.multiple
        if max(size) > limit:
            raise VelaturaError(
                f"Asked for {size[1]} x {size[0]} pixels (width x height); this model's positions end at "
                f"{limit} pixels a side. Set the adapter's `height` and `width`, or the prompt's `size`, to no more."
            )
        return size

    def set_times(self, scheduler: Any, steps: int, tokens: int) -> None:
        """The scheduler's own spacing; shifted by the picture's size where its configuration says so."""
        dynamic = scheduler.config.use_dynamic_shifting
        scheduler.set_timesteps(steps, **({"mu": shift_of(scheduler.config, tokens)} if dynamic else {}))

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B C h w] to images [B 3 H W]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            z = x.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            return from_signed(vae.decode(z).sample)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B C h w]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            z = vae.encode(to_signed(images).to(vae.dtype)).latent_dist.mode()
            return cast("Tensor", ((z - vae.config.shift_factor) * vae.config.scaling_factor).float())

    @property
    def _shrink(self) -> int:
        """Sides of a latent in pixels."""
        return int(2 ** (len(self.folder.config("vae")["block_out_channels"]) - 1))

    @property
    def _patch(self) -> int:
        return int(self.folder.config("transformer")["patch_size"])

    @contextmanager
    def _width_of_text(self) -> Iterator[None]:
        """Without T5 the stock pipeline asks its transformer how wide the zeros in place of T5's states are."""
        pipe: Any = self.pipe
        if pipe.text_encoder_3 is not None or pipe.transformer is not None:
            yield
            return
        with torch.device("meta"):
            pipe.transformer = self.folder.transformer_class().from_config(self.folder.config("transformer"))
        try:
            yield
        finally:
            pipe.transformer = None
