"""Qwen-Image, tiny; its parts are also those of the family that edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import qwen_tokenizer, saved
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "qwen-image"
OPTIONS: dict[str, Any] = {"height": 64, "width": 96}
EDITS = False
CHANNELS = 4


def text_encoder(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 14,
            "out_hidden_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    ))  # fmt: skip


def vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
    )  # fmt: skip


def transformer(**options: Any) -> Any:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(2)
    return QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6), **options,
    )  # fmt: skip


def scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def build(folder: Path) -> Path:
    from diffusers import QwenImagePipeline

    tokenizer = qwen_tokenizer()
    pipe = QwenImagePipeline(
        scheduler=scheduler(), vae=vae(), text_encoder=text_encoder(tokenizer), tokenizer=tokenizer,
        transformer=transformer(),
    )  # fmt: skip
    return saved(pipe, folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]."""
    return pipe(
        prompt=prompt.text,
        negative_prompt=" " if scale > 1 else None,
        true_cfg_scale=scale,
        **OPTIONS,
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
