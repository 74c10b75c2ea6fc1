"""One step of reinforcement learning in bare torch: what `rl_step.py` measures the framework against.

Nothing of the framework but the network and the functions of its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from velatura.api import Conditioning, ModelAdapter, Prompt

SCALE, LR, KL, BETA, LONGEST = 2.0, 1e-4, 1e-4, 1.0, 5.0
"""Guidance scale; learning rate; coefficient of the velocity KL; nft's beta; nft's largest advantage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much work a step is."""

    task: str
    prompts: int
    group: int
    solver_steps: int
    timesteps: int
    updates: int
    batch: int
    repeats: int


class Floor:
    """Three copies of one network, and an optimiser."""

    def __init__(self, adapter: ModelAdapter[Any], prompts: Sequence[Prompt], size: Size) -> None:
        self.adapter, self.prompts, self.size = adapter, prompts, size
        self.net = adapter.load(torch.device("cpu"))
        self.old, self.reference = (deepcopy(self.net).requires_grad_(False) for _ in range(2))
        self.weights = list(self.net.parameters())
        self.adam = torch.optim.AdamW(self.weights, lr=LR, weight_decay=0.0, fused=True)
        self.taken = 0

    def step(self) -> None:
        """Sample with the old policy, then `updates` steps of nft with a velocity KL."""
        size, adapter = self.size, self.adapter
        first = self.taken * size.prompts
        prompts = [self.prompts[(first + i) % len(self.prompts)] for i in range(size.prompts)]
        times = adapter.times(size.solver_steps)
        latents = self.sample(prompts, times)
        adapter.decode(latents)
        z = torch.randn(size.prompts, size.group)
        advantage = ((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)).flatten()
        trained = 1 + torch.randperm(size.solver_steps - 1)[: size.timesteps]
        for i in range(size.updates):
            rows = torch.arange(i, size.prompts, size.updates)
            self.update([prompts[row] for row in rows], rows, latents, advantage, times[trained])
        with torch.no_grad():
            for kept, weight in zip(self.old.parameters(), self.weights, strict=True):
                kept.lerp_(weight, 0.99)
        self.taken += 1

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], times: torch.Tensor) -> torch.Tensor:
        """Euler steps under guidance; a prompt's prefix is computed once, and the null prefix once for all drawings."""
        size, adapter, net = self.size, self.adapter, self.old
        finished: list[torch.Tensor] = []
        once: Conditioning | None = None
        each = max(1, size.batch // (2 * size.group))
        for start in range(0, size.prompts, each):
            part = list(prompts[start : start + each])
            cond = adapter.prepare(net, adapter.encode(part))
            if size.task == "edit":
                null = adapter.prepare(net, adapter.null(part))
            else:  # the same for every prompt
                once = once or adapter.prepare(net, adapter.null(part[:1]))
                null = once.select(torch.zeros(len(part), dtype=torch.int64))
            rows = torch.arange(len(part)).repeat_interleave(size.group)
            x = torch.randn(len(rows), *adapter.noise(part[:1], [0]).shape[1:])
            joint = cond.join(null) if 2 * len(rows) <= size.batch else None
            for k in range(size.solver_steps):
                t = times[k].expand(len(rows))
                if joint is not None:
                    both = torch.cat([rows, rows + len(part)])
                    v, v_null = adapter.velocity(net, torch.cat([x, x]), torch.cat([t, t]), joint, both).chunk(2)
                else:
                    v, v_null = (adapter.velocity(net, x, t, branch, rows) for branch in (cond, null))
                x = x + (times[k + 1] - times[k]) * (v_null + SCALE * (v - v_null))
            finished.append(x)
        return torch.cat(finished)

    def update(
        self,
        prompts: Sequence[Prompt],
        groups: torch.Tensor,
        latents: torch.Tensor,
        advantage: torch.Tensor,
        times: torch.Tensor,
    ) -> None:
        """One AdamW step on the points of a few groups; noise is shared within a group."""
        group, count = self.size.group, len(times)
        samples = (groups[:, None] * group + torch.arange(group)).flatten().repeat_interleave(count)
        rows = torch.arange(len(groups)).repeat_interleave(group * count)
        t = times.repeat(len(groups) * group)
        drawn = torch.randn(len(groups), 1, count, *latents.shape[1:])
        noise = drawn.expand(-1, group, *drawn.shape[2:]).flatten(0, 2)
        x0, share = latents[samples], t[:, None, None]
        x, target = (1 - share) * x0 + share * noise, noise - x0
        cond = self.adapter.encode(prompts)
        with torch.no_grad():
            v_old, v_ref = (
                self.adapter.velocity(net, x, t, self.adapter.prepare(net, cond), rows)
                for net in (self.old, self.reference)
            )
        v = self.adapter.velocity(self.net, x, t, self.adapter.prepare(self.net, cond), rows)
        r = (advantage[samples] / (2 * LONGEST) + 0.5).clamp(0, 1)
        policy = torch.zeros(len(t))
        for weight, implied in ((r, v_old + BETA * (v - v_old)), (1 - r, v_old - BETA * (v - v_old))):
            error = share * (implied - target)
            size = error.detach().abs().flatten(1).double().mean(1).clamp_min(1e-5).float()
            policy = policy + weight * error.square().flatten(1).mean(1) / size * LONGEST / BETA
        loss = (policy + KL * (v - v_ref).square().flatten(1).mean(1)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
