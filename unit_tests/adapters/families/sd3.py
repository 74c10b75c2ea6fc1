"""Stable Diffusion 3, tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import saved
from torch import Tensor

from velatura.api import Prompt

ADAPTER = "sd3"
OPTIONS: dict[str, Any] = {"height": 32, "width": 48}
EDITS = False
JOINED = True
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77,
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((chr(code), -3.0) for code in range(33, 127))], extra_ids=0)


def clip(tokenizer: Any, seed: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def t5(tokenizer: Any, width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
    ))  # fmt: skip


def vae(blocks: int = 2, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(4,) * blocks, layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        use_quant_conv=False, use_post_quant_conv=False,
        **{"scaling_factor": 1.5, "shift_factor": 0.06, **options},
    )  # fmt: skip


def build(folder: Path, *, with_t5: bool = True, **scheduler: Any) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    words, pieces = clip_tokenizer(), t5_tokenizer()
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=32,
    )  # fmt: skip
    return saved(
        StableDiffusion3Pipeline(
            transformer=transformer, vae=vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            text_encoder=clip(words, 0), tokenizer=words, text_encoder_2=clip(words, 1), tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5(pieces) if with_t5 else None, tokenizer_3=pieces if with_t5 else None,
        ),
        folder,
    )  # fmt: skip


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B C h w]."""
    return pipe(
        prompt=prompt.text,
        guidance_scale=scale,
        **OPTIONS,
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
