"""What a family's row of a prompt looks like, without asking the text encoders: shapes and types, all numbers zero.

For `velatura check`, which estimates the memory of a model whose encoders are too large to be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from velatura.api import Prompt
from velatura.plugins.adapters.conditioning import Row
from velatura.plugins.adapters.sizes import shape_of

if TYPE_CHECKING:
    from velatura.plugins.adapters.diffusers_base import DiffusersAdapter

LETTERS, TEMPLATE = 4, 16
"""Letters that make a token, about, and tokens that a template adds: the length of a prompt that is not tokenized."""


def blank_row(adapter: DiffusersAdapter[Any], prompt: Prompt, text: str) -> Row:
    """The row of `prompt`, zero, in one of `FAMILIES`."""
    return FAMILIES[adapter.name](adapter, prompt, len(text) // LETTERS + TEMPLATE)


def _zeros(adapter: DiffusersAdapter[Any], *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=adapter.dtype)


def _qwen_image_21(adapter: Any, prompt: Prompt, length: int) -> Row:
    config = adapter.folder.config("transformer")
    sizes = [adapter._source_size(*source.shape[1:]) for source in prompt.sources]
    tokens = sum(height * width // 256 for height, width in sizes)
    slots = torch.arange(length + tokens // 4) < tokens // 4
    row = {"text": _zeros(adapter, len(slots), config["context_in_dim"]), "slots": slots}
    return row | ({"sources": _zeros(adapter, tokens, config["in_channels"])} if sizes else {})


def _qwen_image(adapter: Any, prompt: Prompt, length: int) -> Row:
    config = adapter.folder.config("transformer")
    return {"text": _zeros(adapter, min(length, adapter.options.text_tokens), config["joint_attention_dim"])}


def _qwen_image_edit_plus(adapter: Any, prompt: Prompt, length: int) -> Row:
    from velatura.plugins.adapters.qwen_image_edit_plus import _resized_size

    config, options = adapter.folder.config("transformer"), adapter.options
    shapes = [shape_of(source) for source in prompt.sources]
    drawn = [_resized_size(shape, options.source_area) for shape in shapes]
    seen = [_resized_size(shape, options.encoder_area) for shape in shapes]
    tokens = sum(height * width // adapter.multiple**2 for height, width in drawn)
    length += sum(height * width // 28**2 for height, width in seen)
    return {
        "text": _zeros(adapter, length, config["joint_attention_dim"]),
        "sources": _zeros(adapter, tokens, config["in_channels"]),
    }


def _sd3(adapter: Any, prompt: Prompt, length: int) -> Row:
    config = adapter.folder.config("transformer")
    clip = 77
    return {
        "text": _zeros(adapter, clip + adapter.options.max_sequence_length, config["joint_attention_dim"]),
        "pooled": _zeros(adapter, config["pooled_projection_dim"]),
    }


def _flux(adapter: Any, prompt: Prompt, length: int) -> Row:
    config = adapter.folder.config("transformer")
    row = {
        "text": _zeros(adapter, adapter.options.text_tokens, config["joint_attention_dim"]),
        "pooled": _zeros(adapter, config["pooled_projection_dim"]),
    }
    return row | _source_tokens(adapter, prompt, lambda shape: adapter._source_size(*shape), "source")


def _flux2(adapter: Any, prompt: Prompt, length: int) -> Row:
    config = adapter.folder.config("transformer")
    row = {"text": _zeros(adapter, adapter.options.text_tokens, config["joint_attention_dim"])}
    return row | _source_tokens(
        adapter, prompt, lambda shape: adapter._source_size(*adapter._shrunk(*shape)), "sources"
    )


def _source_tokens(
    adapter: Any, prompt: Prompt, sized: Callable[[tuple[int, int]], Any], name: str
) -> dict[str, Tensor]:
    """Latents of all sources, a token per `multiple` x `multiple` pixels."""
    if not prompt.sources:
        return {}
    sizes = [sized(shape_of(source)) for source in prompt.sources]
    tokens = sum(height * width // adapter.multiple**2 for height, width in sizes)
    return {name: _zeros(adapter, tokens, adapter.folder.config("transformer")["in_channels"])}


def _z_image(adapter: Any, prompt: Prompt, length: int) -> Row:
    width = adapter.folder.config("transformer")["cap_feat_dim"]
    return {"text": _zeros(adapter, min(length, adapter.options.text_tokens), width)}


def _sana(adapter: Any, prompt: Prompt, length: int) -> Row:
    length = adapter.options.max_sequence_length
    width = adapter.folder.config("transformer")["caption_channels"]
    return {"text": _zeros(adapter, length, width), "mask": torch.ones(length, dtype=torch.int64)}


FAMILIES: Mapping[str, Callable[[Any, Prompt, int], Row]] = {
    "qwen-image-21": _qwen_image_21,
    "qwen-image": _qwen_image,
    "qwen-image-edit-plus": _qwen_image_edit_plus,
    "sd3": _sd3,
    "flux": _flux,
    "flux2": _flux2,
    "z-image": _z_image,
    "sana": _sana,
}
"""Adapter -> its row, for a text of so many tokens."""
