"""FLUX.2 klein before its distillation, tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flux2
import torch
from parts import qwen_tokenizer, saved
from torch import Tensor

from velatura.api import Prompt
from velatura.plugins.adapters.pictures import to_pil

ADAPTER = "flux2"
OPTIONS: dict[str, Any] = {"height": 64, "width": 96, "text_tokens": 96}
EDITS = True


def text_encoder(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=512, initializer_range=0.5,
    ))  # fmt: skip


def build(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    tokenizer = qwen_tokenizer()
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=flux2.autoencoder(),
        text_encoder=text_encoder(tokenizer), tokenizer=tokenizer,
        transformer=flux2.transformer(guidance_embeds=False, text=24), is_distilled=False,
    )  # fmt: skip
    return saved(pipe, folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The latents [B ...] after the stock pipeline's last step: those that it returns are unpacked and scaled."""
    height, width = (96, 64) if len(prompt.sources) == 1 else (64, 96)
    seen: list[Tensor] = []

    def keep(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    pipe(
        image=[to_pil(source) for source in prompt.sources] or None,
        prompt=prompt.text,
        guidance_scale=scale,
        height=height,
        width=width,
        max_sequence_length=OPTIONS["text_tokens"],
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        callback_on_step_end=keep,
    )
    return seen[-1]
