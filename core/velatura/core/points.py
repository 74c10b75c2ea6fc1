"""Rollouts to state points: where velocities are compared, in micro-batches that share a prompt's prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from velatura.core.components import Kernel
from velatura.core.seeds import generator
from velatura.core.types import Points, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PointNoise:
    """Where the noise of re-noised points comes from: (seed, step, prompt, timestep), and the sample unless shared."""

    seed: int
    step: int
    shared: bool
    """One noise per group and timestep, so that samples of a group differ in x_0 alone."""

    def draw(self, prompt: Prompt, sample: int, k: int, shape: Sequence[int]) -> Tensor:
        """fp32 noise of `shape`."""
        path = (self.step, prompt.id, k) if self.shared else (self.step, prompt.id, k, sample)
        return torch.randn(tuple(shape), generator=generator(self.seed, "points", *path))


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The points of a few prompts of one layout."""

    prompts: tuple[Prompt, ...]
    rows: Tensor
    """[N] row of each point's prompt in `prompts`."""
    points: Points
    teacher: str | None = None
    """Weight set that fills the TEACHER role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Samples of one prompt that are to be learned from."""

    prompt: Prompt
    samples: tuple[int, ...]
    """Rows of the samples in the rollout."""
    numbers: tuple[int, ...]
    """Position of each sample within its group: names its noise, whatever rank or batch it lands in."""

    def split(self, limit: int) -> list[Group]:
        """This group in parts of at most `limit` samples."""
        return [
            Group(prompt=self.prompt, samples=self.samples[i : i + limit], numbers=self.numbers[i : i + limit])
            for i in range(0, len(self.samples), limit)
        ]


def pieces(groups: Sequence[Group], points_per_sample: int, limit: int) -> Iterator[list[Group]]:
    """Micro-batches of at most `limit` points, of groups of one layout; a group is split only when it alone is larger
    (then its parts share no prefix)."""
    batch: list[Group] = []
    size = 0
    for whole in groups:
        for group in whole.split(max(1, limit // points_per_sample)):
            own = len(group.samples) * points_per_sample
            if batch and size + own > limit:
                yield batch
                batch, size = [], 0
            batch.append(group)
            size += own
    if batch:
        yield batch


def idle(batch: MicroBatch) -> MicroBatch:
    """The first point of a batch, weighing nothing: a rank that has run out of work still takes part in a backward."""
    row = int(batch.rows[0])
    given = {field.name: getattr(batch.points, field.name) for field in fields(Points)}
    first = {name: value[:1] for name, value in given.items() if isinstance(value, Tensor)}
    points = Points(**given | first | {"weight": torch.zeros_like(first["weight"])})
    return replace(batch, prompts=(batch.prompts[row],), rows=torch.zeros_like(batch.rows[:1]), points=points)


def forward_points(
    groups: Sequence[Group],
    latents: Tensor,
    advantages: Tensor,
    times: Tensor,
    train: Tensor,
    step_weight: Tensor,
    noise: PointNoise,
    total: int,
) -> MicroBatch:
    """Forward-process points: x_t = (1 - t) x_0 + t eps at the trained times of each sample, u = eps - x_0.

    `latents` [B ...], `advantages` [B], `times` [T], `train` [M]; N = samples x M points, sample-major.
    `total`: points of the whole optimiser step, over all ranks.
    """
    rows, index, t, eps, weight = [], [], [], [], []
    for row, group in enumerate(groups):
        for b, number in zip(group.samples, group.numbers, strict=True):
            for k in train.tolist():
                rows.append(row)
                index.append(b)
                t.append(float(times[k]))
                weight.append(float(step_weight[k]) / total)
                eps.append(noise.draw(group.prompt, number, k, latents.shape[1:]))
    device = latents.device
    at = torch.tensor(index, device=device)
    x0 = latents[at]
    time = torch.tensor(t, device=device)
    noise_x = torch.stack(eps).to(device)
    share = time.reshape(-1, *[1] * (x0.ndim - 1))
    return MicroBatch(
        prompts=tuple(group.prompt for group in groups),
        rows=torch.tensor(rows, device=device),
        points=Points(
            x=(1 - share) * x0 + share * noise_x,
            t=time,
            advantage=advantages.to(device)[at],
            weight=torch.tensor(weight, device=device),
            x0=x0,
            target=noise_x - x0,
            group=torch.tensor(rows, device=device),
        ),
    )


def trajectory_points(
    groups: Sequence[Group],
    trajectory: Tensor,
    advantages: Tensor,
    times: Tensor,
    train: Tensor,
    step_weight: Tensor,
    total: int,
    kernel: Kernel[Any] | None = None,
    log_prob: Tensor | None = None,
) -> MicroBatch:
    """Points on visited states: `trajectory` [T B ...]; N = samples x M points, sample-major. `kernel` drew the steps,
    `log_prob` [K B] is how likely they were."""
    device = trajectory.device
    samples = torch.tensor([b for group in groups for b in group.samples], device=device)
    rows = torch.tensor([row for row, group in enumerate(groups) for _ in group.samples], device=device)
    steps = train.to(device)
    count = len(steps)
    at, k = samples.repeat_interleave(count), steps.repeat(len(samples))
    times = times.to(device)
    return MicroBatch(
        prompts=tuple(group.prompt for group in groups),
        rows=rows.repeat_interleave(count),
        points=Points(
            x=trajectory[k, at],
            t=times[k],
            advantage=advantages.to(device)[at],
            weight=step_weight.to(device)[k] / total,
            x_next=trajectory[k + 1, at],
            t_next=times[k + 1],
            kernel=kernel,
            log_prob=None if log_prob is None else log_prob[k, at],
            group=rows.repeat_interleave(count),
        ),
    )
