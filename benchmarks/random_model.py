"""Qwen-Image 2.1's adapter over random weights, with the shared prefix of a prompt and without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel
from torch import Tensor, nn

from velatura.api import Conditioning, Prompt
from velatura.plugins.adapters.lora import add_lora, unwrap
from velatura.plugins.adapters.qwen_image_21 import PIXELS, QwenImage21


@dataclass(slots=True)
class Seen:
    """How many tokens went through the network."""

    tokens: int = 0

    def note(self, _: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        """A hook before the forward: tokens of pictures, and of the text that is not replaced by them."""
        names = ("hidden_states", "encoder_hidden_states", "timestep", "img_shapes", "img_mask")
        told = dict(zip(names, given, strict=False)) | dict(named)
        hidden, length = told["hidden_states"], told["encoder_hidden_states"].shape[1]
        words = int((~told["img_mask"][0, :length]).sum()) if length else 0
        self.tokens += len(hidden) * (hidden.shape[1] + words)


SEEN = Seen()


class Random(QwenImage21):
    """The adapter of Qwen-Image 2.1 over random weights, made on the device in their precision."""

    name = "random"
    words = 32

    def load(self, device: torch.device) -> nn.Module:
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(self.dtype)
            with torch.device(device):
                net = QwenImage21Transformer2DModel.from_config(self.folder.config("transformer")).train(False)
                add_lora(net, self.options.lora_rank or 1, self.options.lora_rank or 1)
        finally:
            torch.set_default_dtype(before)
        if self.options.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        net.register_forward_pre_hook(SEEN.note, with_kwargs=True)
        return net

    def row(self, prompt: Prompt, text: str, size: tuple[int, int]) -> Mapping[str, Tensor]:
        """Random states of `words` words and of the latents of the sources."""
        config, draw = self.folder.config("transformer"), torch.Generator().manual_seed(len(text))
        grids = [self._source_size(*source.shape[1:]) for source in prompt.sources]
        tokens = sum((height // PIXELS) * (width // PIXELS) for height, width in grids)
        slots = torch.tensor([True] * (tokens // 4) + [False] * self.words)
        row = {"text": torch.randn(len(slots), config["context_in_dim"], generator=draw).to(self.dtype), "slots": slots}
        if grids:
            row["sources"] = torch.randn(tokens, config["in_channels"], generator=draw).to(self.dtype)
        return row

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """The first three channels, 16 times as large."""
        height, width = (side // PIXELS for side in self.size_of(prompt))
        colours = torch.sigmoid(x[..., :3].float()).transpose(1, 2).reshape(len(x), 3, height, width)
        return nn.functional.interpolate(colours, scale_factor=PIXELS)


class Unshared(Random):
    """The same network, each point with its whole sequence, as the stock pipeline computes it."""

    name = "unshared"

    def prepare(self, net: nn.Module, cond: Conditioning) -> Conditioning:
        return cond

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Any, rows: Tensor) -> Tensor:
        told, target = cond.index[rows], cond.layout.target
        dtype = unwrap(net).dtype
        tokens = x.to(dtype)
        if cond.sources is not None:
            tokens = torch.cat([cond.sources[told].to(dtype), tokens], dim=1)
        slots = torch.tensor([*cond.layout.slots, *[True] * (target.tokens // 4)], device=x.device)[None]
        images = [[*cond.layout.sources, target]]
        out: Tensor = net(tokens, cond.text[told].to(dtype), t, images, slots.expand(len(x), -1), return_dict=False)[0]
        return out[:, -target.tokens :].float()


def model_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """What the adapter reads of a model: its index and its configurations."""
    index = {"transformer": ["diffusers", "QwenImage21Transformer2DModel"],
             "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}  # fmt: skip
    parts = {
        "model_index.json": {"_class_name": "QwenImage21Pipeline", **index},
        "transformer/config.json": config,
        "scheduler/scheduler_config.json": {"use_dynamic_shifting": True},
        "text_encoder/config.json": {}, "processor/config.json": {}, "vae/config.json": {},
    }  # fmt: skip
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def parameters(config: Mapping[str, Any]) -> int:
    """How many, without making one."""
    with torch.device("meta"):
        return sum(p.numel() for p in QwenImage21Transformer2DModel(**config).parameters())
