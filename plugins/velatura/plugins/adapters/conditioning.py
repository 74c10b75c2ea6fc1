"""What families that have nothing to precompute tell their network of a prompt: named tensors, a row per prompt."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from velatura.api import Conditioning

Row = Mapping[str, Tensor]
"""One prompt's tensors, without a batch axis."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowsConditioning(Conditioning):
    """P prompts over U <= P distinct stored rows."""

    layout: Hashable
    """What must be equal in a batch: size of the target and of the source images."""
    tensors: Row
    """Each [U ...]; those named in `lengths` are zero-padded at the end of their first own axis."""
    lengths: Row
    """Each [U] int64: the true length of a padded tensor's rows."""
    index: Tensor
    """[P] int64: the stored row of each prompt."""
    pads: bool = False
    """Whether conditionings of different lengths share a forward: where padding changes nothing."""

    @classmethod
    def of(cls, layout: Hashable, rows: Sequence[Row], ragged: Sequence[str], *, pads: bool = False) -> Self:
        """Stack one row per prompt; tensors named in `ragged` may differ in length and are padded to the longest."""
        tensors: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        for name in rows[0]:
            own = [row[name] for row in rows]
            if name in ragged:
                lengths[name] = torch.tensor([len(tensor) for tensor in own])
                tensors[name] = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
            else:
                tensors[name] = torch.stack(own)
        return cls(layout=layout, tensors=tensors, lengths=lengths, index=torch.arange(len(rows)), pads=pads)

    def __len__(self) -> int:
        """P."""
        return len(self.index)

    def take(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Tensors [N ...] of the points that belong to the prompts `rows` [N], cut to the longest of them; and for
        each padded tensor a mask [N L], True where there is something, or None where nothing is padded."""
        stored = self.index[rows.to(self.index.device)]
        masks: dict[str, Tensor | None] = {}
        taken = {name: tensor.index_select(0, stored) for name, tensor in self.tensors.items()}
        for name, every in self.lengths.items():
            length = every.to(stored.device)[stored]
            longest = int(length.max())
            taken[name] = taken[name][:, :longest]
            full = bool((length == longest).all())
            masks[name] = None if full else torch.arange(longest, device=stored.device) < length[:, None]
        return taken, masks

    def select(self, rows: Tensor) -> Self:
        """The conditioning of the prompts `rows` [P'], storing only the distinct rows they use."""
        stored, index = torch.unique(self.index[rows.to(self.index.device)], return_inverse=True)
        return replace(
            self,
            tensors={name: tensor.index_select(0, stored) for name, tensor in self.tensors.items()},
            lengths={name: tensor[stored.cpu()] for name, tensor in self.lengths.items()},
            index=index,
        )

    def expand(self, count: int) -> Self:
        """The single stored row as the conditioning of `count` prompts, without copying it."""
        return replace(self, index=self.index.new_zeros(count))

    def to(self, device: torch.device) -> Self:
        """A copy on `device`."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, index=self.index.to(device))

    def join(self, other: Conditioning) -> Conditioning | None:
        """Rows of `self`, then rows of `other`; None where layouts differ, or lengths of what does not pad freely."""
        if not isinstance(other, RowsConditioning) or self.layout != other.layout:
            return None
        same = all(tensor.shape[1:] == other.tensors[name].shape[1:] for name, tensor in self.tensors.items())
        if not same and not self.pads:
            return None
        return replace(
            self,
            tensors={name: _stacked(tensor, other.tensors[name]) for name, tensor in self.tensors.items()},
            lengths={name: torch.cat([tensor, other.lengths[name]]) for name, tensor in self.lengths.items()},
            index=torch.cat([self.index, other.index + len(next(iter(self.tensors.values())))]),
        )


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both [U L ...], the shorter ones padded with zeros."""
    if first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    stacked = first.new_zeros(len(first) + len(second), max(first.shape[1], second.shape[1]), *first.shape[2:])
    stacked[: len(first), : first.shape[1]] = first
    stacked[len(first) :, : second.shape[1]] = second
    return stacked
