"""Muon for the matrices of a network's blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from velatura.core.engine.protocol import OptimizerConfig
from velatura.core.errors import VelaturaError

MOMENTUM = ("momentum_buffer",)
"""What Muon remembers of a matrix."""


def block_matrices(module: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The trained two-dimensional weights inside a `ModuleList`: those that carry tokens from layer to layer.

    Embeddings, the first and the last projection, and modulations outside the blocks are left to AdamW.
    """
    blocks = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, nn.ModuleList))
    found = {name: p for name, p in trained.items() if p.ndim == 2 and name.startswith(blocks)} if blocks else {}
    if not found:
        raise VelaturaError(
            "optimizer.kind muon found no matrix to train inside a block of the network. Use adamw for this model."
        )
    return found


def muon(matrices: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Torch's Muon: momentum .95 with Nesterov, five Newton-Schulz steps, lr sqrt(max(1, rows / columns)).

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    if not hasattr(torch.optim, "Muon"):
        raise VelaturaError(f"optimizer.kind muon needs torch 2.9 or newer; here is {torch.__version__}. Use adamw.")
    return torch.optim.Muon(matrices, lr=config.matrix_lr, momentum=0.95, weight_decay=config.weight_decay)
