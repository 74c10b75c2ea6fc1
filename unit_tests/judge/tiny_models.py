"""Vision-language models with random weights, saved as transformers saves them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters" / "families"))

from parts import qwen_tokenizer
from qwen_image import text_encoder as qwen25

from velatura.plugins.adapters.processors import image_only

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen3(tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(
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


FAMILIES = {"qwen3-vl": (qwen3, "Qwen3VLProcessor", 16), "qwen2.5-vl": (qwen25, "Qwen2_5_VLProcessor", 14)}


def save_model(folder: Path, family: str) -> Path:
    """A model folder of a family; weights large enough that pictures and texts change its mind."""
    from transformers import Qwen2VLImageProcessor

    make, processor_class, patch = FAMILIES[family]
    torch.manual_seed(3)
    tokenizer = qwen_tokenizer()
    net = make(tokenizer)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                weight.mul_(12 if "embed" in name or "lm_head" in name else 10)
    net.save_pretrained(folder)
    side = 2 * patch
    pictures = Qwen2VLImageProcessor(patch_size=patch, merge_size=2, min_pixels=side**2, max_pixels=(8 * side) ** 2)
    image_only(processor_class)(pictures, tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    config = folder / "processor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"processor_class": processor_class}))
    return folder
