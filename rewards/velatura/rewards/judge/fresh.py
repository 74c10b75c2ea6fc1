"""A tiny vision-language model with random weights and a tokenizer of its own, for worlds as small as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from velatura.api import Options
from velatura.plugins.adapters.processors import image_only

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's form of a conversation, without tools and videos."""
HEAD = 16
"""Channels of an attention head."""
MERGE = 2
"""Patches on a side that become one token of the language model."""


SHORT = 12
"""Characters of a line that is not worth a token."""


class Fresh(Options):
    """Size and words of a model that starts from random weights. All of it is trained."""

    width: int = Field(64, ge=32, multiple_of=32, description="Channels of a token, 16 for each attention head.")
    layers: int = Field(2, ge=1, description="Blocks of the language model.")
    vision_width: int = Field(64, ge=32, multiple_of=32, description="Channels of a patch.")
    vision_layers: int = Field(2, ge=1, description="Blocks of the vision tower.")
    patch: int = Field(2, ge=1, description="Pixels on a side of a patch; two by two patches become one token.")
    side: int = Field(24, ge=4, description="Pixels on a side of the pictures; others are scaled to about this area.")
    words: tuple[str, ...] = Field(
        (), description="Words that are one token each, beside those of the rubric; all others are spelt in bytes."
    )
    seed: int = Field(0, ge=0, description="Draws the weights.")

    @model_validator(mode="after")
    def _has_a_token(self) -> Self:
        if self.side < MERGE * self.patch:
            raise ValueError(f"side {self.side} is smaller than one token: {MERGE} patches of {self.patch} pixels")
        return self


def fresh_model(options: Fresh, text: str) -> tuple[Any, Any]:
    """A Qwen3-VL network, fp32, and its processor: a function of `options` and of `text`, what all questions share.

    Each long line of `text` is a single token: weights that have read nothing cannot read a rubric, and would only take
    longer.
    """
    lines = [line for line in dict.fromkeys(text.split("\n")) if len(line) > SHORT]
    tokenizer = fresh_tokenizer([*text.split("\n"), *(f"{gap}{word}" for word in options.words for gap in ("", " "))])
    tokenizer.add_tokens(sorted(lines, key=len, reverse=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = _network(options, tokenizer)
    return net, _processor(options, tokenizer)


def fresh_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level pairs merged until each word of `texts` is one token, as far as that goes; digits stay single."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    stock: Any = transformers.Qwen2Tokenizer
    plain = stock(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[], unk_token=None)
    learner: Any = Tokenizer(models.BPE())
    learner.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    trainer: Any = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges, vocabulary = _merges(learner), learner.get_vocab()
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return stock(
        vocab={token: number for number, token in enumerate([*ordered, *SPECIAL])}, merges=merges,
        additional_special_tokens=list(SPECIAL[1:]), pad_token=SPECIAL[0], unk_token=None, eos_token=SPECIAL[2],
    )  # fmt: skip


def _merges(learner: Any) -> list[tuple[str, str]]:
    """The merges that were learnt, first to last."""
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def _network(options: Fresh, tokenizer: Any) -> Any:
    import transformers

    token = tokenizer.convert_tokens_to_ids
    grid = -(-options.side // options.patch)
    config: Any = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": options.width, "intermediate_size": 3 * options.width,
            "num_hidden_layers": options.layers, "num_attention_heads": options.width // HEAD,
            "num_key_value_heads": options.width // HEAD, "head_dim": HEAD, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": options.vision_layers, "hidden_size": options.vision_width,
            "intermediate_size": 3 * options.vision_width, "num_heads": options.vision_width // HEAD,
            "patch_size": options.patch, "spatial_merge_size": MERGE, "out_hidden_size": options.width,
            "num_position_embeddings": max(4, grid) ** 2, "deepstack_visual_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    make: Any = transformers.Qwen3VLForConditionalGeneration
    return make(config)


def _processor(options: Fresh, tokenizer: Any) -> Any:
    import transformers

    pixels = options.side**2
    token = (MERGE * options.patch) ** 2
    make: Any = transformers.Qwen2VLImageProcessorPil
    pictures = make(patch_size=options.patch, merge_size=MERGE, min_pixels=min(token, pixels), max_pixels=pixels)
    return image_only("Qwen3VLProcessor")(pictures, tokenizer, chat_template=TEMPLATE)
