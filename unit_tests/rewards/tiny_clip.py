"""Tiny CLIP and SigLIP folders with random weights, of the classes that published ones have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters" / "families"))

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip(folder: Path, *, tokens: int = 77, seed: int = 0) -> Path:
    """A CLIP like PickScore's, that sees 32 x 32 pixels."""
    from sd3 import clip_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    words = clip_tokenizer()
    marks = {f"{mark}_token_id": getattr(words, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(
        text_config={**SMALL, **marks, "vocab_size": len(words), "max_position_embeddings": tokens},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8}, projection_dim=16,
    ))  # fmt: skip
    size = {"height": 32, "width": 32}
    return _saved(folder, model, words, CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size))


def siglip(folder: Path) -> Path:
    """A SigLIP that sees 32 x 32 pixels and reads 64 tokens."""
    from sd3 import t5_tokenizer
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    words = t5_tokenizer()
    torch.manual_seed(1)
    model = SiglipModel(SiglipConfig(
        text_config={**SMALL, "vocab_size": len(words), "max_position_embeddings": 64, "projection_size": 16},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
    ))  # fmt: skip
    return _saved(folder, model, words, SiglipImageProcessorPil(size={"height": 32, "width": 32}))


def _saved(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder
