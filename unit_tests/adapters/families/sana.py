"""Sana, tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import saved
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "sana"
OPTIONS: dict[str, Any] = {"height": 32, "width": 64}
EDITS = False
JOINED = True


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*special, "▁", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    return GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def gemma(tokenizer: Any, width: int = 16) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(1)
    return Gemma2Model(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    ))  # fmt: skip


def build(folder: Path) -> Path:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer = gemma_tokenizer()
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=32, timestep_scale=0.5,
    )  # fmt: skip
    torch.manual_seed(2)
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )  # fmt: skip
    pipe = SanaPipeline(
        tokenizer=tokenizer, text_encoder=gemma(tokenizer), vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    return saved(pipe, folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B C h w]."""
    return pipe(
        prompt=prompt.text,
        guidance_scale=scale,
        **OPTIONS,
        use_resolution_binning=False,
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
