"""An adapter: makes one network speak velocity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast
from zlib import crc32

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from velatura.api import Conditioning, ModelAdapter, Options, Prompt

WORDS = 256


class WordsConditioning(Conditioning):
    """Which words a prompt has: [P WORDS] counts."""

    def __init__(self, counts: Tensor) -> None:
        """`counts` [P WORDS]."""
        self.counts = counts

    def __len__(self) -> int:
        return len(self.counts)

    def select(self, rows: Tensor) -> Self:
        """The prompts `rows`, in that order."""
        return type(self)(self.counts[rows])

    def to(self, device: torch.device) -> Self:
        """A copy on `device`."""
        return type(self)(self.counts.to(device))


class _Network(nn.Module):
    """Convolutions over pixels; time and words shift the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.words = nn.Linear(WORDS + 1, width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, counts: Tensor) -> Tensor:
        shift = self.words(torch.cat([counts, t[:, None]], 1))
        last: Tensor = self.last(torch.nn.functional.silu(self.first(x) + shift[:, :, None, None]))
        return last


class PixelsOptions(Options):
    """Options of `pixels`."""

    side: int = Field(16, ge=4, description="Height and width of a picture.")
    width: int = Field(16, ge=1, description="Channels of the network.")


class Pixels(ModelAdapter[PixelsOptions]):
    """A small convolutional flow over pixels, from scratch. Latents are the pixels in [-1, 1].

    Put your network in its place: time 1 is noise, 0 is data, and the velocity is dx/dt = eps - x_0.
    """

    name = "pixels"

    def load(self, device: torch.device) -> nn.Module:
        """All weights are trained; the same at every start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Network(self.options.width).to(device)

    def encode(self, prompts: Sequence[Prompt]) -> WordsConditioning:
        """Word counts, by a hash that is the same in every process."""
        counts = torch.zeros(len(prompts), WORDS)
        for row, prompt in enumerate(prompts):
            for word in prompt.text.lower().split():
                counts[row, crc32(word.encode()) % WORDS] += 1
        return WordsConditioning(counts)

    def null(self, prompts: Sequence[Prompt]) -> WordsConditioning:
        """No words."""
        return WordsConditioning(torch.zeros(len(prompts), WORDS))

    def noise(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        """[B 3 side side], each row from its own seed."""
        shape = (3, self.options.side, self.options.side)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def times(self, steps: int, prompt: Prompt | None = None) -> Tensor:
        """Even steps from 1 to 0."""
        return torch.linspace(1, 0, steps + 1)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """[N 3 side side] at states x, times t; point n belongs to row rows[n] of `cond`."""
        counts = cast("WordsConditioning", cond).counts
        velocity: Tensor = net(x, t, counts[rows])
        return velocity

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """[B 3 side side] in [0, 1]."""
        return (x / 2 + 0.5).clamp(0, 1)

    def latents(self, images: Tensor) -> Tensor:
        """The inverse of `decode`."""
        return images * 2 - 1

    def export(self, net: nn.Module, folder: Path, *, info: Mapping[str, Any]) -> None:
        """Weights and `info`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), folder / "model.safetensors")
        (folder / "velatura.json").write_text(json.dumps(dict(info), default=str))
