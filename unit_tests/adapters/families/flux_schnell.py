"""FLUX.1 schnell, tiny: no guidance embedding, no shift."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flux
import torch
from parts import saved
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "flux"
OPTIONS: dict[str, Any] = {"height": 64, "width": 96, "text_tokens": 48, "true_cfg": True}
EDITS = False


def build(folder: Path) -> Path:
    from diffusers import FluxPipeline

    return saved(FluxPipeline(**flux.components(guidance_embeds=False, shifting=False)), folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]."""
    return pipe(
        prompt=prompt.text,
        negative_prompt="",
        true_cfg_scale=scale,
        height=OPTIONS["height"],
        width=OPTIONS["width"],
        max_sequence_length=OPTIONS["text_tokens"],
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
