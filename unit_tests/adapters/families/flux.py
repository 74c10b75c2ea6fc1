"""FLUX.1 dev, tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import saved
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "flux"
OPTIONS: dict[str, Any] = {"height": 64, "width": 96, "text_tokens": 64, "embedded_guidance": 2.5, "true_cfg": True}
EDITS = False


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={text: i for i, text in enumerate(words)}, merges=[], model_max_length=16)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((chr(code), -3.0) for code in range(33, 127))], extra_ids=0)


def components(*, guidance_embeds: bool, shifting: bool) -> dict[str, Any]:
    """Parts of a pipeline."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip, t5, channels = clip_tokenizer(), t5_tokenizer(), 4
    torch.manual_seed(0)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifting, shift=3.0 if shifting else 1.0),
        "vae": AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[4, 4, 4, 8], norm_num_groups=2, layers_per_block=1, latent_channels=channels,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(
            vocab_size=len(clip), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        )),
        "tokenizer": clip,
        "text_encoder_2": T5EncoderModel(T5Config(
            vocab_size=len(t5), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        )),
        "tokenizer_2": t5,
        "transformer": FluxTransformer2DModel(
            in_channels=4 * channels, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
        ),
    }  # fmt: skip


def build(folder: Path) -> Path:
    from diffusers import FluxPipeline

    return saved(FluxPipeline(**components(guidance_embeds=True, shifting=True)), folder)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]."""
    return pipe(
        prompt=prompt.text,
        negative_prompt="",
        true_cfg_scale=scale,
        guidance_scale=OPTIONS["embedded_guidance"],
        height=OPTIONS["height"],
        width=OPTIONS["width"],
        max_sequence_length=OPTIONS["text_tokens"],
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
