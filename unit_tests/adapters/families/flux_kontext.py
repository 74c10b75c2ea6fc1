"""FLUX.1 Kontext, tiny: draws, and edits one source image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import flux
import torch
from parts import saved
from torch import Tensor

from velatura.api import Prompt
from velatura.plugins.adapters.pictures import to_pil

ADAPTER = "flux"
SIZES = [(64, 160), (96, 112), (112, 80), (160, 48)]
"""Heights and widths that sources are resized to, in place of the megapixel of the real model."""
OPTIONS: dict[str, Any] = {"height": 64, "width": 96, "text_tokens": 64, "true_cfg": True, "source_sizes": SIZES}
EDITS = True
MOST_SOURCES = 1


def build(folder: Path) -> Path:
    from diffusers import FluxKontextPipeline

    return saved(FluxKontextPipeline(**flux.components(guidance_embeds=True, shifting=True)), folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]."""
    height, width = (96, 64) if prompt.sources else (64, 96)
    resolutions = [(width, height) for height, width in SIZES]
    with patch("diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS", resolutions):
        return pipe(
            image=to_pil(prompt.sources[0]) if prompt.sources else None,
            prompt=prompt.text,
            negative_prompt="",
            true_cfg_scale=scale,
            height=height,
            width=width,
            max_area=height * width,
            max_sequence_length=OPTIONS["text_tokens"],
            num_inference_steps=steps,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
