"""Arithmetic of weights: what several models learned from one start, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DOWN, UP = ".lora_A.", ".lora_B."
"""In the names of the two factors of a low-rank weight, UP DOWN."""

Weights = Mapping[str, Tensor]


def merge(start: Weights, models: Sequence[Weights], shares: Sequence[float]) -> dict[str, Tensor]:
    """start + sum_i shares_i (models_i - start), tensor by tensor, summed in fp64 and kept in the start's precision.

    Shares of 1 / n are the average of n models, shares of 1 task arithmetic (Ilharco et al., arXiv 2212.04089, eq. 2).
    Two factors of a low-rank weight are no weight themselves: there the products are added, and the sum is cut to the
    rank it had, by its singular values (the nearest product of that rank, Eckart and Young 1936).

    Raises:
        KeyError: a model lacks a tensor of the start.
    """
    merged = {}
    for name, begin in start.items():
        if DOWN in name and name.replace(DOWN, UP) in start:
            up = name.replace(DOWN, UP)
            factors = [(own[up], own[name]) for own in models]
            merged[up], merged[name] = (part.to(begin.dtype) for part in nearest_product(factors, shares))
        elif name not in merged and not (UP in name and name.replace(UP, DOWN) in start):
            learned = sum(
                share * (own[name].double() - begin.double()) for own, share in zip(models, shares, strict=True)
            )
            merged[name] = (begin.double() + learned).to(begin.dtype)
    return {name: merged[name] for name in start}


def nearest_product(factors: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """sum_i shares_i U_i D_i as one product of the same rank: (U [out r], D [r in]), fp64.

    The sum is never formed: both sides are orthogonalised, and the singular values of the small middle are those of
    the sum.
    """
    rank = factors[0][1].shape[0]
    ups = torch.cat([share * up.double() for (up, _), share in zip(factors, shares, strict=True)], dim=1)
    downs = torch.cat([down.double() for _, down in factors], dim=0)
    left, middle = torch.linalg.qr(ups)
    right, other = torch.linalg.qr(downs.T)
    u, size, v = torch.linalg.svd(middle @ other.T, full_matrices=False)
    root = size[:rank].sqrt()
    return left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ right.T)
