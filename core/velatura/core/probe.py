"""Fixed states to measure a student on. Its loss on its own states says little, because those move with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from velatura.core.learner import Learner
from velatura.core.points import Group, MicroBatch, trajectory_points
from velatura.core.rollout import Sampler, rollout
from velatura.core.seeds import derive
from velatura.core.types import Prompt, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """States on a teacher's own guided trajectories for held-out prompts, and its velocity there."""

    route: str
    batches: tuple[MicroBatch, ...]
    targets: tuple[Tensor, ...]


def make_probe(
    learner: Learner, sampler: Sampler, route: str, teacher: str, prompts: Sequence[Prompt], seed: int
) -> Probe:
    """Let the teacher draw `prompts` under its guidance and remember where it went."""
    guided = replace(sampler, role=Role.TEACHER)
    seeds = [[derive(seed, "probe", route, prompt.id)] for prompt in prompts]
    batches, targets = [], []
    with learner.policy.on_device(teacher, learner.engine.device):
        with learner.policy.wearing(teacher) as net:
            chunks = list(rollout(net, guided, prompts, seeds, keep_trajectory=True))
        for chunk in chunks:
            batch = _points(chunk.rows.tolist(), chunk.trajectory, prompts, sampler, teacher)
            targets.append(learner.teacher_velocity(batch))
            batches.append(batch)
    return Probe(route=route, batches=tuple(batches), targets=tuple(targets))


def _points(
    rows: Sequence[int], trajectory: Tensor | None, prompts: Sequence[Prompt], sampler: Sampler, teacher: str
) -> MicroBatch:
    if trajectory is None:
        raise ValueError("a probe needs the visited states")
    groups = [Group(prompt=prompts[row], samples=(b,), numbers=(0,)) for b, row in enumerate(rows)]
    times = sampler.adapter.times(sampler.steps, groups[0].prompt)
    train = torch.arange(1, sampler.steps, 2) if sampler.steps > 1 else torch.arange(1)
    weight = torch.ones(sampler.steps)
    zeros = torch.zeros(len(rows))
    return replace(
        trajectory_points(groups, trajectory, zeros, times, train, weight, len(rows) * len(train)), teacher=teacher
    )


def probe_error(learner: Learner, probe: Probe) -> float:
    """Mean squared difference of the student's conditional velocity and the teacher's guided one."""
    total, count = 0.0, 0
    for batch, target in zip(probe.batches, probe.targets, strict=True):
        cond = learner.encoder.cond(batch.prompts)
        with learner.policy.wearing("current") as net:
            own = learner.adapter.velocity(
                net, batch.points.x, batch.points.t, learner.adapter.prepare(net, cond), batch.rows
            )
        total += float((own.float() - target.float()).square().mean()) * len(own)
        count += len(own)
    return total / max(1, count)
