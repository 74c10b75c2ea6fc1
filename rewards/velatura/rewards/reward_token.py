"""Judges that answer with numbers: a head on the state of a special token of a vision-language model.

Used by `hpsv3` and `editreward`, whose checkpoints have one layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from velatura.api import Context, Options, VelaturaError
from velatura.rewards.judge.pictures import to_picture
from velatura.rewards.pretrained import filled, opened, read_weights

TOKEN = "<|Reward|>"
KINDS = {"qwen2_vl": ("Qwen2VLModel", "Qwen2VLProcessor"), "qwen2_5_vl": ("Qwen2_5_VLModel", "Qwen2_5_VLProcessor")}
"""`model_type` of the base: the class of its network, and of its processor."""
PIXELS = 256 * 28 * 28
"""Of every picture, up to what the patches allow: the judges were trained on this size alone."""
LAYER = re.compile(r"^(\d+)\.(weight|bias)$")


class RewardTokenOptions(Options):
    """What both judges need."""

    revision: str | None = Field(None, description="On the hub: branch, tag or commit of `path`.")
    pixels: int = Field(PIXELS, ge=784, description="Every picture is resized to about this many.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="`auto` is the device of the run; or `cuda:1`."
    )
    dtype: str = Field("bf16", pattern="^(fp32|bf16)$", description="Of the network; its heads are fp32.")
    batch: int = Field(4, ge=1, description="Pictures in one forward.")


class RewardToken:
    """A frozen network with one or more heads, and the processor that it was trained with."""

    def __init__(
        self, user: str, path: Path, base: str, heads: Sequence[str], options: RewardTokenOptions, context: Context
    ) -> None:
        """`heads`: how the names of each head begin in the file.

        Raises:
            VelaturaError: base or weights are not there, or do not fit each other.
        """
        import transformers

        config = opened(user, transformers.AutoConfig, base, context)
        if config.model_type not in KINDS:
            raise VelaturaError(f"'{user}': {base!r} is of type '{config.model_type}'; it takes {' or '.join(KINDS)}.")
        kind, processor = KINDS[config.model_type]
        self.processor = _processor(user, processor, base, context)
        self.options, self._user = options, user
        place = context.device if options.device == "auto" else torch.device(options.device)
        weights = read_weights(user, path)
        found = {head: {n.removeprefix(head): v for n, v in weights.items() if n.startswith(head)} for head in heads}
        body = body_of({n: v for n, v in weights.items() if not n.startswith(tuple(heads)) and n != "lm_head.weight"})
        words = body.get("language_model.embed_tokens.weight")
        self.token = int(self.processor.tokenizer.convert_tokens_to_ids(TOKEN))
        if words is None or len(words) <= self.token:
            raise VelaturaError(f"'{user}': {path} has no word vector for {TOKEN}: it is no checkpoint of this judge.")
        config.text_config.vocab_size = len(words)
        dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        self.model = filled(user, path, getattr(transformers, kind), config, body, dtype).to(place)
        self.heads = {head: head_of(user, path, head, found[head]).to(place) for head in heads}

    @torch.no_grad()
    def ask(self, head: str, questions: Sequence[tuple[Sequence[Tensor], str]]) -> Tensor:
        """[B 2] mean and log of the deviation, for B questions of pictures [3 H W] and a text with the token in it."""
        rows = [self._row(pictures, text) for pictures, text in questions]
        answers = [
            self._forward(head, rows[start : start + self.options.batch])
            for start in range(0, len(rows), self.options.batch)
        ]
        return torch.cat(answers).cpu()

    def _row(self, pictures: Sequence[Tensor], text: str) -> tuple[str, list[Image.Image]]:
        """A question in the chat format, and its pictures in the size of the judge."""
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        chat = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return str(chat), [self._sized(to_picture(picture, None)) for picture in pictures]

    def _sized(self, picture: Image.Image) -> Image.Image:
        images = self.processor.image_processor
        sides = sides_of(picture.size, images.patch_size * images.merge_size, self.options.pixels)
        return picture.resize(sides, Image.Resampling.BICUBIC)

    def _forward(self, head: str, rows: Sequence[tuple[str, list[Image.Image]]]) -> Tensor:
        """[B 2]. Positions count tokens one by one: the judges were trained so, unlike the networks they come from."""
        self.processor.tokenizer.padding_side = "right"
        inputs = self.processor(
            text=[text for text, _ in rows], images=[pictures for _, pictures in rows], padding=True,
            return_tensors="pt", images_kwargs={"do_resize": False},
        )  # fmt: skip
        device, dtype = self.model.device, self.model.dtype
        moved = {n: v.to(device, dtype) if v.is_floating_point() else v.to(device) for n, v in inputs.items()}
        ids = moved["input_ids"]
        places = torch.arange(ids.shape[1], device=device).expand(3, len(ids), -1)
        states = self.model(**moved, position_ids=places, use_cache=False).last_hidden_state
        at = (ids == self.token).int()
        if not bool((at.sum(1) == 1).all()):
            raise VelaturaError(f"'{self._user}': its question must hold {TOKEN} once. Check the file of prompts.")
        answer: Tensor = self.heads[head](states[torch.arange(len(ids)), at.argmax(1)].float())
        return answer


def _processor(user: str, kind: str, base: str, context: Context) -> Any:
    """The processor of the base, with the reward token as a last word."""
    from tokenizers import AddedToken

    from velatura.plugins.adapters.processors import image_only

    processor = opened(user, image_only(kind), base, context, "processor")
    processor.tokenizer.add_tokens([AddedToken(TOKEN, special=True, normalized=False)], special_tokens=True)
    return processor


def sides_of(size: tuple[int, int], step: int, pixels: int) -> tuple[int, int]:
    """Width and height in whole `step`s, in about the given shape: at most `pixels` together where the nearest steps
    are more, and else at least so many."""
    nearest = [max(step, round(side / step) * step) for side in size]
    scale = math.sqrt(pixels / (size[0] * size[1]))
    area = nearest[0] * nearest[1]
    if area == pixels:
        return nearest[0], nearest[1]
    towards = math.floor if area > pixels else math.ceil
    width, height = (max(step, towards(side * scale / step) * step) for side in size)
    return width, height


def body_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of transformers 5: `visual.` and `language_model.`, whichever version wrote them."""
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        inner = name.removeprefix("model.")
        is_known = inner.startswith(("visual.", "language_model."))
        named[inner if is_known else f"language_model.{inner}"] = value
    return named


def head_of(user: str, path: Path, prefix: str, weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Linear layers with ReLU between them, in fp32; two numbers come out.

    Raises:
        VelaturaError: the file has no such head.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if match := LAYER.match(name):
            layers.setdefault(int(match[1]), {})[match[2]] = value.float()
    whole = layers and all(set(layer) == {"weight", "bias"} for layer in layers.values())
    if not whole or len(layers[max(layers)]["bias"]) != 2:
        raise VelaturaError(f"'{user}': {path} has no head {prefix!r} of linear layers that ends in two numbers.")
    made: list[nn.Module] = []
    for number in sorted(layers):
        inner, outer = layers[number]["weight"].shape[1], layers[number]["weight"].shape[0]
        linear = nn.Linear(inner, outer)
        linear.load_state_dict(layers[number])
        made += [linear, nn.ReLU()]
    return nn.Sequential(*made[:-1]).requires_grad_(False).train(False)


def said(answer: Tensor) -> str:
    """A note from mean and log deviation [2]."""
    mean, spread = answer.tolist()
    return f"mean {mean:.3f}, deviation {math.exp(min(spread, 30.0)):.3f}"


def plain(text: str) -> str:
    """A prompt in which no token of the chat format is written out."""
    return text.replace("<|", "< |").replace("|>", "| >")
