"""The reward `image-reward`: a BLIP that reads the prompt while it looks, and a head that was fitted to choices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from velatura.api import Context, Prompt, Sample, Scores, VelaturaError
from velatura.rewards.aesthetic import head_of
from velatura.rewards.dual_encoder import to_bytes
from velatura.rewards.pretrained import (
    NetworkOptions,
    NetworkReward,
    filled,
    opened,
    read_weights,
    ready,
    scored,
    weights_file,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's answers on the authors' pictures; scores are standardised by them."""
TOKENS = 35
"""Of a prompt that are read."""
HEAD_WIDTH = 64
"""Of the attention in every vision transformer that BLIP was published with."""
EYE, READER, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
EYE_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".attn.proj.": ".self_attn.projection.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}
"""Pieces of names in the file, and what transformers calls them."""
NOT_READ = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")


class ImageRewardOptions(NetworkOptions):
    """Options of `image-reward`."""

    path: str = Field(
        "THUDM/ImageReward", description="A file of weights or its folder, seen from the recipe, or a name on the hub."
    )
    file: str = Field("ImageReward.pt", description="The file in `path`.")
    config: str = Field("med_config.json", description="Sizes of the text encoder: a file beside the weights.")
    tokenizer: str = Field("bert-base-uncased", description="A folder, seen from the recipe, or a name on the hub.")


class ImageReward(NetworkReward[ImageRewardOptions]):
    """How much people prefer a picture for its prompt, about -2 to 2: (head(h) - .167) / 1.033.

    h is the first state of BLIP's text encoder, which attends to the picture; BLIP and five linear layers were
    fine-tuned on 137,000 comparisons by experts (arXiv:2304.05977). Code Apache 2.0; see the card of the weights. The
    file has the authors' names, which are translated; only tensors are read from it.

    Known holes. It sees 224 x 224 pixels of the middle and 35 tokens. It was learnt from pictures of Stable Diffusion 1
    and its contemporaries. Trained on, it brings large, centred, repeated subjects. It does not apply to edits.
    """

    name = "image-reward"
    _network: Judge | None = None

    def setup(self, context: Context) -> None:
        """Load the network.

        Raises:
            VelaturaError: a part is not there, or does not fit.
        """
        from transformers import AutoTokenizer

        options = self.options
        path = weights_file(self.name, options.path, options.file, options.revision, context)
        beside = str(path.parent) if path.parent.joinpath(options.config).is_file() else options.path
        sizes = weights_file(self.name, beside, options.config, options.revision, context)
        tokenizer = opened(self.name, AutoTokenizer, options.tokenizer, context, "tokenizer")
        judge = Judge(self.name, path, json.loads(sizes.read_text()), tokenizer, options.precision)
        self._network = judge.to(options.place(context))

    def dimension(self) -> str:
        """What was asked for, and taste."""
        return "alignment"

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that draw from text."""
        return not prompt.sources

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B], about -2 to 2; higher is better."""
        judge: Judge = ready(self._network, self.name)
        return scored(samples, self.options.batch, judge.judge)


class Judge(nn.Module):
    """The eye, the reader and the head of ImageReward, frozen."""

    def __init__(self, user: str, path: Path, sizes: Mapping[str, Any], tokenizer: Any, dtype: torch.dtype) -> None:
        """`sizes`: what is in `med_config.json`.

        Raises:
            VelaturaError: the file holds something else.
        """
        super().__init__()
        from transformers import BlipVisionModel, CLIPImageProcessorPil
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        weights = read_weights(user, path)
        eye, reader, head = (_part(weights, prefix) for prefix in (EYE, READER, HEAD))
        if not eye or not reader or not head:
            raise VelaturaError(
                f"'{user}': {path} holds no ImageReward: no tensor begins with {EYE}, {READER} or {HEAD}."
            )
        eye = {_eye_name(name): value for name, value in eye.items()}
        look, read = _vision_config(user, path, eye), _text_config(user, sizes, eye)
        self.eye = filled(user, path, BlipVisionModel, look, eye, dtype)
        self.reader = filled(user, path, _without_pooler(BlipTextModel), read, reader, dtype)
        self.head = head_of(user, path, head)
        self.tokenizer = tokenizer
        side = {"height": look.image_size, "width": look.image_size}
        self.pictures = CLIPImageProcessorPil(size={"shortest_edge": look.image_size}, crop_size=side)

    @torch.no_grad()
    def judge(self, samples: Sequence[Sample]) -> Tensor:
        """[B] scores."""
        device, dtype = self.eye.device, self.eye.dtype
        shown = [to_bytes(sample.image) for sample in samples]
        pixels = self.pictures(shown, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        seen = self.eye(pixel_values=pixels.to(device, dtype)).last_hidden_state
        words = [sample.prompt.text for sample in samples]
        tokens = self.tokenizer(words, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        states = self.reader(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        found: Tensor = self.head(states[:, 0].float())[:, 0]
        return (found - MEAN) / STD


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin with `prefix`, without it."""
    held = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return {name: value for name, value in held.items() if not name.endswith(NOT_READ)}


def _eye_name(name: str) -> str:
    """What transformers calls a tensor of the vision transformer."""
    for theirs, ours in EYE_NAMES.items():
        name = name.replace(theirs, ours)
    return "post_layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name


def _vision_config(user: str, path: Path, eye: Mapping[str, Tensor]) -> Any:
    """Sizes of the vision transformer, read off its tensors.

    Raises:
        VelaturaError: there is no such transformer.
    """
    from transformers import BlipVisionConfig

    try:
        width, _, patch, _ = eye["embeddings.patch_embedding.weight"].shape
        places = eye["embeddings.position_embedding"].shape[1] - 1
        inner = eye["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise VelaturaError(f"'{user}': {path} holds no vision transformer of BLIP ({error}).") from error
    layers = 1 + max(int(name.split(".")[2]) for name in eye if name.startswith("encoder.layers."))
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(places) * patch, patch_size=patch, layer_norm_eps=1e-6,
    )  # fmt: skip


def _text_config(user: str, sizes: Mapping[str, Any], eye: Mapping[str, Tensor]) -> Any:
    """Sizes of the text encoder, from its file.

    Raises:
        VelaturaError: the file lacks one.
    """
    from transformers import BlipTextConfig

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "max_position_embeddings", "hidden_act", "layer_norm_eps")  # fmt: skip
    lacking = [name for name in names if name not in sizes]
    if lacking:
        raise VelaturaError(f"'{user}': the configuration of the text encoder lacks {', '.join(lacking)}.")
    given: dict[str, Any] = {name: sizes[name] for name in names}
    marks: dict[str, Any] = {f"{mark}_token_id": 0 for mark in ("bos", "eos", "sep")}  # not used: nothing is generated
    width = eye["embeddings.class_embedding"].shape[-1]
    return BlipTextConfig(**given, **marks, encoder_hidden_size=width, pad_token_id=sizes.get("pad_token_id", 0))


def _without_pooler(kind: Any) -> Any:
    """The class, made without the layer that ImageReward does not have."""

    class Reader(kind):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config, add_pooling_layer=False)

    return Reader
