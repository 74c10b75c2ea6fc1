"""AuraFlow, tiny: spatial latents, both branches in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import saved
from sd3 import t5_tokenizer, vae
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "diffusers-flow"
OPTIONS: dict[str, Any] = {"height": 32, "width": 48}
EDITS = False
JOINED = True


def build(folder: Path) -> Path:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    torch.manual_seed(1)
    encoder = UMT5EncoderModel(UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
    ))  # fmt: skip
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=1024,
    )  # fmt: skip
    pipe = AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae(shift_factor=None), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
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
