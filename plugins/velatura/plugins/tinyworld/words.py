"""The text encoder of the world: a frozen random vector per word, and with every word those before it.

A language model's token knows what was said before it: `square` in `a blue square` is a blue one. So does a token here,
which makes it much easier to learn which colour belongs to which shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from velatura.api import VelaturaError

LENGTH = 12
"""Tokens of every encoded text, padding included; the longest instruction has 11 words."""
WORD_WIDTH = 64
CONTEXT = 6
"""Words that a token carries: its own and the five before it, in this order."""
WIDTH = CONTEXT * WORD_WIDTH

_WORDS = (
    "a an and on of left right above below red blue green yellow circle square triangle circles squares triangles "
    "outlined two three four white black portrait alice bob carol dave erin frank smiling sad neutral "
    "make the remove add background give person hair brown orange pink"
)
VOCABULARY = tuple(_WORDS.split())


@cache
def table() -> Tensor:
    """[words + 1, 64] float32: row 0 is zero (null and padding), the others standard normal, the same everywhere."""
    # The legacy generator: its stream is promised never to change, and a checkpoint's meaning hangs on it.
    drawn = np.random.RandomState(20250505).standard_normal((len(VOCABULARY), WORD_WIDTH))
    return torch.cat([torch.zeros(1, WORD_WIDTH), torch.from_numpy(drawn.astype(np.float32))])


@cache
def _rows() -> dict[str, int]:
    return {word: row for row, word in enumerate(VOCABULARY, start=1)}


def tokenise(text: str) -> list[int]:
    """Rows of `table` for the words of a text; none for the empty (null) text."""
    words = text.lower().split()
    if len(words) > LENGTH:
        raise VelaturaError(f"The tiny world reads at most {LENGTH} words, this prompt has {len(words)}: {text!r}")
    unknown = [word for word in words if word not in _rows()]
    if unknown:
        raise VelaturaError(
            f"The tiny world does not know the word {unknown[0]!r} in {text!r}. It knows: {', '.join(VOCABULARY)}."
        )
    return [_rows()[word] for word in words]


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [P, 12, 384] float32 and mask [P, 12] bool of P texts.

    A token is its word's vector and those of the five words before it, side by side. Padding is zero and masked. The
    empty text is one zero token that is not masked, so that attention always has something to look at.
    """
    rows = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    mask = torch.zeros(len(texts), LENGTH, dtype=torch.bool)
    for p, text in enumerate(texts):
        tokens = tokenise(text)
        rows[p, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[p, : max(len(tokens), 1)] = True
    behind = F.pad(rows, (CONTEXT - 1, 0)).unfold(1, CONTEXT, 1).flip(2)
    return table()[behind * (rows > 0)[:, :, None]].flatten(2), mask
