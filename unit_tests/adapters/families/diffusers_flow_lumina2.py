"""Lumina 2, tiny: time runs from 0 to 1, its transformer predicts x_0 - eps, and guidance keeps the length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import saved
from sana import gemma, gemma_tokenizer
from sd3 import vae
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "diffusers-flow"
OPTIONS: dict[str, Any] = {"height": 32, "width": 48}
EDITS = False


def build(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = gemma_tokenizer()
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(300, 64, 64), cap_feat_dim=16,
    )  # fmt: skip
    pipe = Lumina2Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(blocks=4), text_encoder=gemma(tokenizer), tokenizer=tokenizer,
    )  # fmt: skip
    return saved(pipe, folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]."""
    return pipe(
        prompt=prompt.text,
        guidance_scale=scale,
        height=OPTIONS["height"],
        width=OPTIONS["width"],
        num_images_per_prompt=len(seeds),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
