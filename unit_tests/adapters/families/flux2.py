"""FLUX.2 dev, tiny."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts import qwen_tokenizer, saved
from torch import Tensor

from velatura.api import Prompt
from velatura.plugins.adapters.pictures import to_pil

ADAPTER = "flux2"
OPTIONS: dict[str, Any] = {"height": 64, "width": 96, "text_tokens": 320, "embedded_guidance": 2.5}
EDITS = True
UNGUIDED = True
LAYERS = 31
"""The pipeline reads the states after layers 10, 20 and 30."""


def autoencoder() -> Any:
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4, batch_norm_eps=1e-4
    )
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def transformer(*, guidance_embeds: bool, text: int) -> Any:
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(2)
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=text, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip


def text_encoder(tokenizer: Any) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    return Mistral3ForConditionalGeneration(Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
            "max_position_embeddings": 512, "initializer_range": 0.5,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "patch_size": 16, "image_size": 32,
        },
        image_token_index=5,
    ))  # fmt: skip


def name_the_processor(folder: Path) -> None:
    """The index of the real model names a processor; its tokenizer is all that prompts need."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "tokenizer": ["transformers", "PixtralProcessor"]}))


def build(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    tokenizer = qwen_tokenizer()
    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=autoencoder(),
        text_encoder=text_encoder(tokenizer), tokenizer=tokenizer,
        transformer=transformer(guidance_embeds=True, text=24),
    )  # fmt: skip
    return saved(pipe, folder, name_the_processor)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...]."""
    height, width = (96, 64) if len(prompt.sources) == 1 else (64, 96)
    return pipe(
        image=[to_pil(source) for source in prompt.sources] or None,
        prompt=prompt.text,
        guidance_scale=OPTIONS["embedded_guidance"],
        height=height,
        width=width,
        max_sequence_length=OPTIONS["text_tokens"],
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
