"""Z-Image, tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import qwen_tokenizer, saved
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "z-image"
OPTIONS: dict[str, Any] = {"height": 64, "width": 96}
EDITS = False
JOINED = True
CHANNELS = 4


def text_encoder(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    return Qwen3Model(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    ))  # fmt: skip


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=CHANNELS, sample_size=64,
        scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def transformer() -> Any:
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(2)
    net = ZImageTransformer2DModel(
        in_channels=CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for token in (net.x_pad_token, net.cap_pad_token):
        torch.nn.init.normal_(token)
    return net


def build(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    tokenizer = qwen_tokenizer()
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(),
        text_encoder=text_encoder(tokenizer), tokenizer=tokenizer, transformer=transformer(),
    )  # fmt: skip
    return saved(pipe, folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]; its guidance scale is the usual one less 1."""
    return pipe(
        prompt=prompt.text,
        guidance_scale=scale - 1,
        **OPTIONS,
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
