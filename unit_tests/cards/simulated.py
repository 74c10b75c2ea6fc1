"""Simulated raters over pictures whose quality is known: 16 x 16, the left third lighter than the right one by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SCALE = 0.1
"""Difference of the two sides for a quality of 1."""
PLUGIN = '''
import torch
from pydantic import Field

from velatura.api import NoOptions, Options, RewardModel, Scores, hookimpl


class ContrastOptions(Options):
    noise: float = Field(0.0, ge=0, description="Standard deviation of each answer.")
    sign: float = Field(1.0, description="-1 prefers the worse.")
    seed: int = Field(0, description="Of the noise.")
    speed: int = Field(1, description="Changes nothing.")


class Contrast(RewardModel[ContrastOptions]):
    """How much lighter the left is than the right, as often as asked with another error."""

    name = "contrast"
    operational = frozenset({"speed"})
    _draw = None

    def needs_card(self):
        return True

    def dimension(self):
        return "alignment"

    def expectations(self):
        return {"thumbnail": "any"}

    def score(self, samples):
        if self._draw is None:
            self._draw = torch.Generator().manual_seed(self.options.seed)
        seen = torch.stack([(s.image[:, :, 1:4].mean() - s.image[:, :, -4:-1].mean()) / 0.1 for s in samples])
        error = torch.randn(len(samples), generator=self._draw)
        return Scores.of(self.options.sign * seen + self.options.noise * error)


@hookimpl
def velatura_reward():
    return [Contrast]
'''


def draw(path: Path, quality: float) -> None:
    """A picture of this quality."""
    pixels = np.full((16, 16, 3), 0.5)
    pixels[:, :5] += SCALE * quality / 2
    pixels[:, -5:] -= SCALE * quality / 2
    Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).save(path)


def shown(quality: float) -> float:
    """The quality after rounding to 8 bits."""
    return (round((0.5 + SCALE * quality / 2) * 255) - round((0.5 - SCALE * quality / 2) * 255)) / 255 / SCALE


def pairs_file(folder: Path, *, prompts: int, error: float, raters: int = 3, seed: int = 0, **more: object) -> Path:
    """Two pairs a prompt; each rater names the better picture, wrongly with probability `error`."""
    rng = np.random.default_rng(seed)
    lines = []
    for prompt in range(prompts):
        for pair in range(2):
            names = [f"{prompt}-{pair}{side}.png" for side in "ab"]
            quality = 3 + rng.normal(size=2)
            for name, q in zip(names, quality, strict=True):
                draw(folder / name, q)
            better = "a" if quality[0] > quality[1] else "b"
            worse = "b" if better == "a" else "a"
            choices = {f"r{i}": worse if rng.random() < error else better for i in range(raters)}
            lines.append({"prompt": f"picture {prompt}", "images": names, "choices": choices,
                          "category": ["light", "dark"][prompt % 2], **more})  # fmt: skip
    return written(folder, lines)


def ratings_file(folder: Path, *, prompts: int, group: int, noise: float, raters: int = 3, seed: int = 0) -> Path:
    """`group` pictures a prompt, each rated from 1 to 5 with an error of this standard deviation."""
    rng = np.random.default_rng(seed)
    lines = []
    for prompt in range(prompts):
        for number in range(group):
            quality = 3 + rng.normal()
            draw(folder / f"{prompt}-{number}.png", quality)
            said = {f"r{i}": float(np.clip(round(quality + noise * rng.normal()), 1, 5)) for i in range(raters)}
            lines.append({"prompt": f"picture {prompt}", "image": f"{prompt}-{number}.png", "ratings": said})
    return written(folder, lines)


def written(folder: Path, lines: list[dict]) -> Path:
    """A file of ratings, and the plugin beside it."""
    (folder / "sim.py").write_text(PLUGIN)
    path = folder / "ratings.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
