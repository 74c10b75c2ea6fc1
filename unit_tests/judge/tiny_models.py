"""Vision-language models with random weights, saved as transformers saves them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters" / "families"))

from parts import byte_alphabet, qwen_tokenizer
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


def qwen_processor(name: str, patch: int, tokenizer: Any) -> Any:
    from transformers import Qwen2VLImageProcessorPil

    side = 2 * patch
    pictures = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, min_pixels=side**2, max_pixels=(8 * side) ** 2)
    return image_only(name)(pictures, tokenizer, chat_template=TEMPLATE)


def idefics_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>",
               "<end_of_utterance>"]  # fmt: skip
    vocabulary = {text: number for number, text in enumerate([*byte_alphabet(), *special])}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=special[1:], pad_token="<|endoftext|>",
        unk_token=None, eos_token="<|im_end|>",
    )  # fmt: skip


def idefics3(tokenizer: Any) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return Idefics3ForConditionalGeneration(Idefics3Config(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 8192, "bos_token_id": tokenizer.pad_token_id, **ends,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def idefics_processor(tokenizer: Any) -> Any:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    edge = {"longest_edge": 32}
    pictures = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    return Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)


@dataclass(frozen=True)
class Family:
    """How to make a model, its processor, and to open the processor again as its users do."""

    model: Callable[[Any], Any]
    tokenizer: Callable[[], Any]
    processor: Callable[[Any], Any]
    opener: Callable[[], Any]
    """The class that opens the saved processor."""


def idefics_class() -> Any:
    from transformers import Idefics3Processor

    return Idefics3Processor


FAMILIES = {
    "qwen3-vl": Family(
        qwen3, qwen_tokenizer, partial(qwen_processor, "Qwen3VLProcessor", 16), partial(image_only, "Qwen3VLProcessor")
    ),
    "qwen2.5-vl": Family(
        qwen25, qwen_tokenizer, partial(qwen_processor, "Qwen2_5_VLProcessor", 14),
        partial(image_only, "Qwen2_5_VLProcessor"),
    ),
    "idefics3": Family(idefics3, idefics_tokenizer, idefics_processor, idefics_class),
}  # fmt: skip


def save_model(folder: Path, family: str) -> Path:
    """A model folder of a family; weights large enough that pictures and texts change its mind."""
    made = FAMILIES[family]
    torch.manual_seed(3)
    tokenizer = made.tokenizer()
    net = made.model(tokenizer)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                weight.mul_(12 if "embed" in name or "lm_head" in name else 10)
    net.save_pretrained(folder)
    made.processor(tokenizer).save_pretrained(folder)
    config = folder / "processor_config.json"
    config.write_text(config.read_text().replace('"ImageOnly', '"'))
    return folder
