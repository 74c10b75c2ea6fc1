"""Ovis-Image, tiny: packed latents behind a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import qwen_tokenizer, saved
from sd3 import vae
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "diffusers-flow"
OPTIONS: dict[str, Any] = {"height": 32, "width": 48, "arguments": {"max_sequence_length": 200}}
EDITS = False


def build(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    torch.manual_seed(1)
    encoder = Qwen3Model(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    ))  # fmt: skip
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(), text_encoder=encoder,
        tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip
    return saved(pipe, folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]."""
    return pipe(
        prompt=prompt.text,
        guidance_scale=scale,
        **OPTIONS["arguments"],
        height=OPTIONS["height"],
        width=OPTIONS["width"],
        num_images_per_prompt=len(seeds),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
