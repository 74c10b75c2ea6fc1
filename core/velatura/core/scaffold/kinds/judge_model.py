"""A judge model: a judge that learns from ratings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from velatura.api import JudgeModel, Loss, Options, Rated, Sample, Scores


class ColourJudgeOptions(Options):
    """Options of `colour-judge`."""

    highest: int = Field(5, ge=2, description="Ratings run from 1 to this.")


class ColourJudge(JudgeModel[ColourJudgeOptions]):
    """A linear judge of the mean and spread of each colour. Put your own network and question in its place."""

    name = "colour-judge"

    @property
    def levels(self) -> Sequence[int]:
        """1 to `highest`."""
        return range(1, self.options.highest + 1)

    def load(self, device: torch.device) -> nn.Module:
        """Six features to one number; all of it is trained."""
        return nn.Linear(6, 1).to(device)

    def loss(self, net: nn.Module, rated: Sequence[Rated]) -> Loss:
        """Mean squared difference to the mean rating, in levels squared."""
        wanted = torch.tensor([one.mean for one in rated])
        marks = self._marks(net, [one.sample for one in rated])
        return Loss(value=(marks - wanted.to(marks)).square().mean())

    def mark(self, net: nn.Module, samples: Sequence[Sample]) -> Scores:
        """[B] marks on the levels."""
        with torch.no_grad():
            return Scores.of(self._marks(net, samples))

    def save(self, net: nn.Module, folder: Path, info: Mapping[str, Any]) -> None:
        """Weights and `info`, for the reward that opens them."""
        save_file(net.state_dict(), folder / "judge.safetensors")
        (folder / "judge.json").write_text(json.dumps(dict(info), default=str))

    def _marks(self, net: nn.Module, samples: Sequence[Sample]) -> Tensor:
        """[B] between the lowest and the highest level."""
        device = next(net.parameters()).device
        features = torch.stack([torch.cat([s.image.mean((1, 2)), s.image.std((1, 2))]) for s in samples]).to(device)
        marks: Tensor = 1 + (self.options.highest - 1) * net(features)[:, 0].sigmoid()
        return marks
