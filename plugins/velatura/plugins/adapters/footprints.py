"""What a diffusers adapter says of its memory, from the configurations in the model's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from velatura.api import Prompt
from velatura.core.footprint import Footprint
from velatura.plugins.adapters.blank_rows import FAMILIES, blank_row

if TYPE_CHECKING:
    from velatura.plugins.adapters.diffusers_base import DiffusersAdapter

TRIED_BYTES = 256 * 2**20
"""Text encoders and autoencoders up to this size are run to see what a prompt becomes."""


def footprint_of(adapter: DiffusersAdapter[Any], prompt: Prompt) -> Footprint | None:
    """Encoders that are small are tried; with large ones a prompt's row has the shapes of its family's rows. None for a
    family whose rows are not known."""
    frozen = adapter.folder.frozen_bytes(adapter.dtype)
    adapter.check_sources(prompt)
    if adapter.name not in FAMILIES:
        return None
    small = bool(frozen) and sum(frozen.values()) < TRIED_BYTES
    seen = adapter.bucketed(prompt)
    with torch.no_grad():
        told, untold = (
            adapter.cached_row(seen, text) if small else blank_row(adapter, seen, text)
            for text in (prompt.text, adapter.options.negative_prompt)
        )
    with torch.device("meta"):
        net = adapter.equipped(adapter.folder.blank("transformer", adapter.dtype))
    layout = adapter.layout(prompt)

    def null(count: int) -> Any:
        adapter.check_guided()
        rows = adapter.collate(layout, [untold] * (count if prompt.sources else 1))
        return rows.expand(count)  # type: ignore[attr-defined]

    still = adapter.without_moving(adapter.folder.blank("vae", adapter.dtype))
    return Footprint(
        net=net,
        cond=lambda count: adapter.collate(layout, [told] * count),
        null=null,
        frozen=frozen,
        vae=still.pipe.vae,
        decode=lambda x: still.decode(x, prompt),
    )
