"""What tiny models are made of: tokenizers from code, and saving a pipeline as diffusers does.

Each module beside this one builds one family offline with random weights, and calls its stock pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level tokenizers write bytes with."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]  # fmt: skip
    vocabulary = {text: number for number, text in enumerate([*byte_alphabet(), *special])}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=special[1:], pad_token="<|endoftext|>",
        unk_token=None, eos_token="<|im_end|>", chat_template=CHAT,
    )  # fmt: skip


def saved(pipe: Any, folder: Path, *afterwards: Callable[[Path], None]) -> Path:
    """Every part without dropout, as a model folder."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.train(False)
    pipe.save_pretrained(folder)
    for change in afterwards:
        change(folder)
    return folder
