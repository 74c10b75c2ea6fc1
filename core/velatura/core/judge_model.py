"""The contract of a judge that can learn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from velatura.core.components import Component, O

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velatura.core.ratings import Rated
    from velatura.core.types import Loss, Sample, Scores


class JudgeModel(Component[O]):
    """A judge that can learn from ratings: its network, its question, its loss.

    It knows nothing of files, splits and optimisers.
    """

    kind: ClassVar[str] = "judge_model"

    @property
    @abstractmethod
    def levels(self) -> Sequence[int]:
        """The levels that ratings and marks lie on, lowest first, in steps of 1."""

    @abstractmethod
    def load(self, device: torch.device) -> nn.Module:
        """The network without dropout, with `requires_grad` set on what is to be trained."""

    @abstractmethod
    def loss(self, net: nn.Module, rated: Sequence[Rated]) -> Loss:
        """The mean loss of B rated pictures, in one forward of `net` (which may be an engine's wrapper of it)."""

    @abstractmethod
    def mark(self, net: nn.Module, samples: Sequence[Sample]) -> Scores:
        """[B] marks on the levels, as the finished judge would give them; no gradient."""

    @abstractmethod
    def save(self, net: nn.Module, folder: Path, info: Mapping[str, Any]) -> None:
        """Write the judge as a reward opens it, with `info` (dimension, splits, figures) beside it."""

    def describe(self) -> Mapping[str, Any]:
        """Facts for `velatura check`: rubric, and where the weights come from."""
        return {}

    def fingerprint(self) -> str:
        """Changes when what `load` starts from does, so that a judge made from something else is fitted again."""
        return ""
