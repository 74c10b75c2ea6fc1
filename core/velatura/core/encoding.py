"""Conditionings, computed once per prompt and step, the null condition once per run and layout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from velatura.core.components import ModelAdapter
from velatura.core.types import Conditioning, Prompt

KEPT = 64
"""Encoded batches that are kept; the oldest leaves first."""

Key = tuple[str, str]


class Encoder:
    """Asks the adapter for what it has not encoded yet. What depends on weights (`prepare`) is not kept here."""

    def __init__(self, adapter: ModelAdapter[Any], device: torch.device) -> None:
        """Conditionings end up on `device`."""
        self.adapter = adapter
        self.device = device
        self._conds: OrderedDict[tuple[Key, ...], Conditioning] = OrderedDict()
        self._nulls: OrderedDict[tuple[Key, ...], Conditioning] = OrderedDict()
        self._shared: dict[Hashable, Conditioning] = {}
        """Layout -> null condition; kept for the whole run."""

    def cond(self, prompts: Sequence[Prompt]) -> Conditioning:
        """[P] the conditioning of prompts that share a layout; rows of an earlier batch are taken from it."""
        return self._rows(self._conds, prompts, self.adapter.encode)

    def null(self, prompts: Sequence[Prompt]) -> Conditioning:
        """[P] the unconditional counterpart. Without source images it is one row for all prompts of a layout."""
        if prompts[0].sources:
            return self._rows(self._nulls, prompts, self.adapter.null)
        layout = self.adapter.layout(prompts[0])
        stored = self._shared.get(layout)
        if stored is None:
            stored = self._shared[layout] = self.adapter.null(prompts[:1]).to(self.device)
        return stored.select(torch.zeros(len(prompts), dtype=torch.int64, device=self.device))

    def forget(self) -> None:
        """Begin a step with nothing but the run's null conditions.

        Rows are taken from earlier batches in the order in which those hold them, and batched arithmetic rounds by
        order: what a step computes must not depend on what happened before it, or a resumed run would differ.
        """
        self._conds.clear()
        self._nulls.clear()

    def _rows(
        self, kept: OrderedDict[tuple[Key, ...], Conditioning], prompts: Sequence[Prompt], encode: Any
    ) -> Conditioning:
        wanted = [(prompt.id, prompt.text) for prompt in prompts]
        for keys, stored in reversed(kept.items()):
            place = {key: row for row, key in enumerate(keys)}
            if all(key in place for key in wanted):
                if list(keys) == wanted:
                    return stored
                return stored.select(torch.tensor([place[key] for key in wanted], device=self.device))
        fresh: Conditioning = encode(prompts).to(self.device)
        kept[tuple(wanted)] = fresh
        while len(kept) > KEPT:
            kept.popitem(last=False)
        return fresh
