"""Z-Image: text to image, one stream of image and caption tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from velatura.api import Conditioning, Prompt
from velatura.plugins.adapters.conditioning import Row, RowsConditioning
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions
from velatura.plugins.adapters.lora import unwrap
from velatura.plugins.adapters.pictures import from_signed, to_signed
from velatura.plugins.adapters.sizes import Size
from velatura.plugins.adapters.times import shift_of


class ZImageOptions(DiffusersOptions):
    """Options of `z-image`."""

    text_tokens: int = Field(512, ge=1, description="Longer prompts, template included, are cut to this many tokens.")
    guidance_limit: float | None = Field(
        None,
        gt=0,
        description="A guided velocity is at most this many times as long as the conditional one; null: any length.",
    )


class ZImage(DiffusersAdapter[ZImageOptions]):
    """Z-Image, text to image.

    Latents are [B C h w]. The network is told 1 - t and answers with -dx/dt.

    The guidance scale has its usual meaning, null + scale (cond - null), so that 1 is the conditional branch alone.
    The stock pipeline writes cond + s (cond - null): its `guidance_scale` s is this scale minus 1, so its 5 is 6 here,
    and its 0 is 1. Its `cfg_normalization` is `guidance_limit`; its `cfg_truncation` is a guidance policy's.
    """

    name = "z-image"
    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    beside_rows: ClassVar[tuple[str, ...]] = ("guidance_limit", "height", "width")
    ragged: ClassVar[tuple[str, ...]] = ("text",)
    pads = True
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")

    @cached_property
    def multiple(self) -> int:
        """Side of a token in pixels: 2 x 2 latent pixels."""
        return int(2 ** len(self.folder.config("vae")["block_out_channels"]))

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """The hidden states [L D] of the text encoder's last layer but one, for the prompt as a chat message."""
        with self.on_device("text_encoder"):
            embeds, _ = self.pipe.encode_prompt(
                text,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.options.text_tokens,
            )
            return {"text": embeds[0]}

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N C h w] at x [N C h w], t [N]."""
        dtype = unwrap(net).dtype
        tensors, masks = cast("RowsConditioning", cond).take(rows)
        texts, mask = tensors["text"].to(dtype), masks["text"]
        lengths = [texts.shape[1]] * len(texts) if mask is None else mask.sum(1).tolist()
        out = net(
            list(x.to(dtype).unsqueeze(2).unbind(0)),
            (1000 - t * 1000) / 1000,
            [text[:length] for text, length in zip(texts, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack([each.float() for each in out]).squeeze(2)

    def guide(self, cond: Tensor, null: Tensor, scale: Tensor) -> Tensor:
        """null + scale (cond - null), written as cond + (scale - 1)(cond - null), cut to `guidance_limit`."""
        each = (-1, *[1] * (cond.ndim - 1))
        guided = cond + (scale - 1).reshape(each) * (cond - null)
        if self.options.guidance_limit is None:
            return guided
        longest = self.options.guidance_limit * torch.linalg.vector_norm(cond.flatten(1), dim=1)
        length = torch.linalg.vector_norm(guided.flatten(1), dim=1)
        return torch.where((length > longest).reshape(each), guided * (longest / length).reshape(each), guided)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """[C h w]."""
        per_side = self.multiple // 2
        return (int(self.folder.config("transformer")["in_channels"]), size[0] // per_side, size[1] // per_side)

    def set_times(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Linearly spaced sigmas, shifted as configured; spaced by torch in fp32, as NumPy differs in the last bit."""
        even = torch.linspace(1.0, 1 / steps, steps).tolist()
        scheduler.set_timesteps(sigmas=even, mu=shift_of(scheduler.config, tokens))

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B C h w] to images [B 3 H W]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            z = x.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            return from_signed(vae.decode(z).sample)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B C h w]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            z = vae.encode(to_signed(images).to(vae.device, vae.dtype)).latent_dist.mode()
            scaled: Tensor = (z - vae.config.shift_factor) * vae.config.scaling_factor
            return scaled.float()
