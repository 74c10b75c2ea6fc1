"""Losses that make a judge agree with ratings. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from velatura.api import Options


class Losses(Options):
    """How much each loss counts; what is 0 is not computed."""

    expectation: float = Field(1.0, ge=0, description="(E[s] - mean rating)^2, E over the levels alone.")
    cross_entropy: float = Field(
        0.1, ge=0, description="-log p of the level nearest to the mean rating, p over all tokens."
    )
    soft: float = Field(
        0.0, ge=0, description="KL(q || p), q the shares of the ratings, p over all tokens; best with 3 raters or more."
    )
    pairs: float = Field(
        0.0, ge=0, description="Bradley-Terry: -log sigmoid(E[s_a] - E[s_b]) where a is rated above b of its prompt."
    )
    rationale: float = Field(0.0, ge=0, description="-log p of the tokens of the rationale, which is written first.")

    @model_validator(mode="after")
    def _learns_something(self) -> Losses:
        if not any(self.model_dump().values()):
            raise ValueError("every loss has weight 0, so there is nothing to learn. Give one a weight")
        return self


def shares(ratings: Sequence[Sequence[float]], levels: Sequence[int]) -> Tensor:
    """[B L] distribution of each row's ratings over the levels; a rating between two levels is split between them, so
    that the mean stays what it was."""
    at = torch.tensor(levels, dtype=torch.float32)
    rows = []
    for own in ratings:
        distance = (torch.tensor(own, dtype=torch.float32)[:, None] - at).abs()
        rows.append((1 - distance).clamp_min(0).mean(0))
    return torch.stack(rows)


def expectation(logprobs: Tensor, levels: Sequence[int]) -> Tensor:
    """[B] expected level of log-probabilities [B L]: a softmax over the levels alone, its mean."""
    return logprobs.softmax(-1) @ torch.tensor(levels, dtype=logprobs.dtype, device=logprobs.device)


def rating_losses(
    logprobs: Tensor, q: Tensor, levels: Sequence[int], prompts: Sequence[str], weights: Losses
) -> dict[str, Tensor]:
    """The losses of B pictures that have a weight, each a mean over pictures or, for `pairs`, over pairs.

    `logprobs` [B L] are of the levels among all tokens, `q` [B L] the shares of the ratings, `prompts` [B] says which
    pictures are for the same prompt; `expectation` is in squared levels, the others in nats.
    """
    at = torch.tensor(levels, dtype=logprobs.dtype, device=logprobs.device)
    mean = q @ at
    marks = expectation(logprobs, levels)
    found: dict[str, Tensor] = {}
    if weights.expectation:
        found["expectation"] = (marks - mean).square().mean()
    if weights.cross_entropy:
        nearest = (mean - at[0] + 0.5).floor().long().clamp(0, len(levels) - 1)
        found["cross_entropy"] = F.nll_loss(logprobs, nearest)
    if weights.soft:
        found["soft"] = (torch.xlogy(q, q) - q * logprobs).sum(-1).mean()
    if weights.pairs:
        found["pairs"] = bradley_terry(marks, mean, prompts)
    return found


def bradley_terry(marks: Tensor, ratings: Tensor, prompts: Sequence[str]) -> Tensor:
    """[] mean over pairs of one prompt of -log P(the rating's order), P(a above b) = sigmoid(mark_a - mark_b).

    Equal ratings are half a win for either. 0 where no prompt has two pictures.
    """
    pairs = [(a, b) for a in range(len(prompts)) for b in range(a) if prompts[a] == prompts[b]]
    if not pairs:
        return marks.sum() * 0
    a, b = torch.tensor(pairs, device=marks.device).T
    wins = (torch.sign(ratings[a] - ratings[b]) + 1) / 2
    return F.binary_cross_entropy_with_logits(marks[a] - marks[b], wins)


def weighted(found: Mapping[str, Tensor], weights: Losses) -> Tensor:
    """[] the sum of the losses, each by its weight."""
    return torch.stack([getattr(weights, name) * value for name, value in found.items()]).sum()
