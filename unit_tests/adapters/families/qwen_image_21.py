"""Qwen-Image 2.1, tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import CHAT, qwen_tokenizer, saved
from torch import Tensor

from velatura.api import Prompt
from velatura.plugins.adapters.pictures import to_pil
from velatura.plugins.adapters.processors import image_only, name_stock_classes

ADAPTER = "qwen-image-21"
OPTIONS: dict[str, Any] = {"height": 64, "width": 96}
EDITS = True


def build(folder: Path, seed: int = 0) -> Path:
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(seed)
    encoder = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 16,
            "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    ))  # fmt: skip
    processor = image_only("Qwen3VLProcessor")(
        Qwen2VLImageProcessor(patch_size=16, merge_size=2, min_pixels=32 * 32, max_pixels=256 * 256),
        tokenizer, chat_template=CHAT,
    )  # fmt: skip
    channels = 8
    pipe = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        vae=AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, False, False, False],
            latents_mean=[0.1] * channels, latents_std=[1.5] * channels,
        ),
        text_encoder=encoder,
        processor=processor,
        transformer=QwenImage21Transformer2DModel(
            in_channels=channels, out_channels=channels, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            context_in_dim=16, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
    return saved(pipe, folder, name_stock_classes)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]."""
    return pipe(
        prompt=prompt.text,
        negative_prompt="" if scale > 1 else None,
        true_cfg_scale=scale,
        image=[to_pil(source) for source in prompt.sources] or None,
        output_resolution=(OPTIONS["height"] * OPTIONS["width"]) ** 0.5,
        **({} if prompt.sources else OPTIONS),
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
