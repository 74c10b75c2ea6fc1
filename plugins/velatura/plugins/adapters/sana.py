"""Sana: linear attention over the latents of an autoencoder that shrinks 32 times, told by a Gemma text encoder."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
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

UNCONDITIONAL = "\0"
"""Begins the text of the null branch, which is encoded without the instruction and so must not share a cached row."""


class SanaOptions(DiffusersOptions):
    """Options of `sana`."""

    max_sequence_length: int = Field(300, ge=2, description="Tokens of a prompt that the transformer sees.")
    complex_human_instruction: tuple[str, ...] | None = Field(
        None, description="Lines put before every prompt; null is the stock pipeline's own text, [] puts nothing."
    )


class Sana(DiffusersAdapter[SanaOptions]):
    """Sana, text to image.

    Latents are [B C h w] in fp32. Guidance is null + scale (cond - null).
    """

    name = "sana"
    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline",)
    beside_rows: ClassVar[tuple[str, ...]] = ("height", "width")

    @property
    def multiple(self) -> int:
        """32, and a whole number of patches."""
        return math.lcm(32, self._shrink * int(self.folder.config("transformer")["patch_size"]))

    def null(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The negative prompt without the instruction; one stored row serves all prompts."""
        for prompt in prompts:
            self.check_sources(prompt)
        one = self._rows(prompts[:1], [UNCONDITIONAL + self.options.negative_prompt])
        return cast("RowsConditioning", one).expand(len(prompts))

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """Hidden states of the text encoder [L D] and which of them are no padding [L]."""
        unconditional = text.startswith(UNCONDITIONAL)
        with self.on_device("text_encoder"):
            embeds, mask, _, _ = self.pipe.encode_prompt(
                text.removeprefix(UNCONDITIONAL), do_classifier_free_guidance=False, device=self.device,
                max_sequence_length=self.options.max_sequence_length,
                complex_human_instruction=None if unconditional else self._instruction,
            )  # fmt: skip
        return {"text": embeds[0], "mask": mask[0]}

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N C h w] at x [N C h w], t [N]."""
        told, _ = cast("RowsConditioning", cond).take(rows)
        config, dtype = unwrap(net).config, unwrap(net).dtype
        (v,) = net(
            x.to(dtype),
            encoder_hidden_states=told["text"].to(dtype),
            encoder_attention_mask=told["mask"],
            timestep=t * 1000 * config.timestep_scale,
            return_dict=False,
        )
        predicts_variance = config.out_channels == 2 * x.shape[1]
        return cast("Tensor", (v.chunk(2, dim=1)[0] if predicts_variance else v).float())

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """[C h w]."""
        channels = int(self.folder.config("transformer")["in_channels"])
        return (channels, size[0] // self._shrink, size[1] // self._shrink)

    def times(self, steps: int, prompt: Prompt | None = None) -> Tensor:
        """[steps + 1], 1 down to 0, with the shift of the folder's scheduler, at every size the same.

        Published folders name DPMSolverMultistepScheduler with flow sigmas: its shift is taken, not its solver.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = self.folder.scheduler()
        if scheduler.config.get("use_flow_sigmas"):
            scheduler = FlowMatchEulerDiscreteScheduler(shift=scheduler.config["flow_shift"])
        elif not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise VelaturaError(
                f"{self.folder.path} names the scheduler {type(scheduler).__name__}; 'sana' can follow "
                "FlowMatchEulerDiscreteScheduler, or one with `use_flow_sigmas`. Change its scheduler."
            )
        scheduler.set_timesteps(steps)
        return cast("Tensor", scheduler.sigmas.float().cpu())

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B C h w] to images [B 3 H W]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            return from_signed(vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B C h w]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            z = vae.encode(to_signed(images).to(vae.dtype)).latent
            return cast("Tensor", (z * vae.config.scaling_factor).float())

    @property
    def _shrink(self) -> int:
        """Sides of a latent in pixels."""
        return int(2 ** (len(self.folder.config("vae")["encoder_block_out_channels"]) - 1))

    @property
    def _instruction(self) -> list[str]:
        given = self.options.complex_human_instruction
        if given is not None:
            return list(given)
        stock: Any = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"]
        return list(stock.default)
