"""Qwen-Image-Edit-Plus, tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from parts import CHAT, qwen_tokenizer, saved
from qwen_image import scheduler, text_encoder, transformer, vae
from torch import Tensor

from velatura.api import Prompt
from velatura.plugins.adapters.pictures import to_pil
from velatura.plugins.adapters.processors import image_only, name_stock_classes

ADAPTER = "qwen-image-edit-plus"
OPTIONS: dict[str, Any] = {"height": 64, "width": 96, "source_area": 64 * 64, "encoder_area": 56 * 56}
EDITS = True
ONLY_EDITS = True


def build(folder: Path) -> Path:
    from diffusers import QwenImageEditPlusPipeline
    from transformers import Qwen2VLImageProcessor

    tokenizer = qwen_tokenizer()
    processor = image_only("Qwen2VLProcessor")(
        Qwen2VLImageProcessor(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=112 * 112),
        tokenizer, chat_template=CHAT,
    )  # fmt: skip
    pipe = QwenImageEditPlusPipeline(
        scheduler=scheduler(), vae=vae(), text_encoder=text_encoder(tokenizer), tokenizer=tokenizer,
        processor=processor, transformer=transformer(zero_cond_t=True),
    )  # fmt: skip
    return saved(pipe, folder, name_stock_classes)


def stock(pipe: Any, prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The stock pipeline's latents [B ...], its constants at the sizes of `OPTIONS`."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    images = [to_pil(source) for source in prompt.sources]
    width, height = module.calculate_dimensions(
        OPTIONS["height"] * OPTIONS["width"], images[-1].size[0] / images[-1].size[1]
    )
    areas = {"VAE_IMAGE_SIZE": OPTIONS["source_area"], "CONDITION_IMAGE_SIZE": OPTIONS["encoder_area"]}
    with patch.multiple(module, **areas):
        return pipe(
            image=images,
            prompt=prompt.text,
            negative_prompt=" " if scale > 1 else None,
            true_cfg_scale=scale,
            height=height,
            width=width,
            num_inference_steps=steps,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
