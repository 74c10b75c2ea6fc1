"""Whether an adapter samples what the family's stock pipeline samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from velatura.core.components import GuidancePolicy, Kernel, ModelAdapter
from velatura.core.rollout import Sampler, rollout
from velatura.core.types import Prompt, Role, Transition

StockSampler = Callable[[Prompt, Sequence[int], int, float], Tensor]
"""(prompt, seeds, steps, scale) -> the latents [B ...] that the stock pipeline ends with, one picture per seed, drawn
in one batch: a batch of another size rounds otherwise."""


class _Euler(Kernel[Any]):
    name = "euler"

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        return Transition(mean=x + (t_next - t) * v, std=torch.zeros(()))


class _Scale(GuidancePolicy[Any]):
    name = "scale"
    value = 1.0

    def scale(self, role: Role, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)


def difference_to_pipeline(
    adapter: ModelAdapter[Any],
    stock: StockSampler,
    prompts: Sequence[Prompt],
    *,
    steps: int = 4,
    scale: float = 1.0,
    joined: bool = False,
) -> float:
    """Largest difference between the latents of Velatura's rollout and the stock pipeline's; 0.0 in fp32 on a CPU.

    `adapter` is set up; every prompt is drawn with two seeds, in one group, as a rollout does it. `joined`: the
    stock pipeline evaluates both guidance branches in one forward, and the rollout may do the same.
    """
    net = adapter.load(torch.device("cpu"))
    guidance = _Scale()
    guidance.value = scale
    worst, seeds = 0.0, [11, 12]
    batch = len(seeds) * (2 if joined else 1)
    for prompt in prompts:
        sampler = Sampler(adapter=adapter, guidance=guidance, kernel=_Euler(), steps=steps, batch=batch)
        ours = torch.cat([chunk.latents for chunk in rollout(net, sampler, [prompt], [seeds])])
        with torch.no_grad():
            theirs = stock(prompt, seeds, steps, scale)
        worst = max(worst, float((ours - theirs).abs().max()))
    return worst
