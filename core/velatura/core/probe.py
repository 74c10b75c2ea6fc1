"""Fixed states to measure a student on. Its loss on its own states says little, because those move with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from velatura.core.learner import Learner
from velatura.core.points import Group, MicroBatch, trajectory_points
from velatura.core.rollout import Chunk, Sampler, rollout
from velatura.core.seeds import derive
from velatura.core.types import Prompt, Role

PROBE = "probe"
"""The weight set of the start, while its probe is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """States on a teacher's own guided trajectories for held-out prompts, and its velocity there."""

    route: str
    batches: tuple[MicroBatch, ...]
    targets: tuple[Tensor, ...]

    def drift(self, learner: Learner) -> dict[str, float]:
        """How far the current policy is from that of the targets: `probe/kl`, the mean squared difference of their
        velocities, and `probe/norm_ratio`, the size of its velocity over theirs."""
        squares, own, other, count = 0.0, 0.0, 0.0, 0
        for batch, target in zip(self.batches, self.targets, strict=True):
            v = learner.current_velocity(batch).float()
            squares += float((v - target.float()).square().sum())
            own, other = own + float(v.square().sum()), other + float(target.float().square().sum())
            count += v.numel()
        ratio = {"probe/norm_ratio": (own / other) ** 0.5} if other else {}  # a network that begins with 0 has none
        return {"probe/kl": squares / max(1, count)} | ratio


def make_probe(
    learner: Learner, sampler: Sampler, route: str, teacher: str, prompts: Sequence[Prompt], seed: int
) -> Probe:
    """Let the teacher draw `prompts` under its guidance and remember where it went."""
    guided = replace(sampler, role=Role.TEACHER)
    seeds = [[derive(seed, "probe", route, prompt.id)] for prompt in prompts]
    with learner.policy.on_device(teacher, learner.engine.device):
        batches = _visited(learner, guided, prompts, seeds, teacher)
        targets = tuple(learner.teacher_velocity(batch) for batch in batches)
    return Probe(route=route, batches=batches, targets=targets)


def start_probe(
    learner: Learner, sampler: Sampler, prompts: Sequence[Prompt], count: int, start: Mapping[str, Tensor], seed: int
) -> Probe:
    """States that the weights `start` visit for `count` prompts, spread over all of them, and their velocity there
    under the guidance of the loss: how far a policy goes is read on these, whatever it draws itself."""
    stride = max(1, len(prompts) // count)
    chosen = [prompts[i] for i in range(0, len(prompts), stride)][:count]
    seeds = [[derive(seed, "probe", "start", prompt.id)] for prompt in chosen]
    policy = learner.policy
    policy.put(PROBE, start, what="the weights that the stage starts from")
    with policy.on_device(PROBE, learner.engine.device):
        batches = _visited(learner, sampler, chosen, seeds, PROBE)
        targets = tuple(learner.current_velocity(batch, PROBE) for batch in batches)
    policy.forget(PROBE)
    return Probe(route="start", batches=batches, targets=targets)


def looked_at(steps: int) -> Tensor:
    """Which states of a trajectory of `steps` steps a probe keeps: every second one."""
    return torch.arange(1, steps, 2) if steps > 1 else torch.arange(1)


def together(batch: int, steps: int) -> tuple[int, int]:
    """How many samples, and how many states of each, go through the network together, for a sampler with `batch` rows
    and `steps` steps."""
    states = len(looked_at(steps))
    return max(1, batch // states), min(batch, states)


def _visited(
    learner: Learner, sampler: Sampler, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], name: str
) -> tuple[MicroBatch, ...]:
    """States that the weight set `name` visits, one chunk of samples after the other."""
    batches: list[MicroBatch] = []
    samples, states = together(sampler.batch, sampler.steps)
    with learner.policy.wearing(name) as net:
        for chunk in rollout(net, sampler, prompts, seeds, keep_trajectory=True):
            for rows in torch.split(torch.arange(len(chunk.rows)), samples):
                for steps in torch.split(looked_at(sampler.steps), states):
                    batches.append(_points(chunk, rows, steps, prompts, sampler, name))
    return tuple(batches)


def _points(
    chunk: Chunk, rows: Tensor, steps: Tensor, prompts: Sequence[Prompt], sampler: Sampler, teacher: str
) -> MicroBatch:
    """The states of some of a chunk's samples at some steps."""
    if chunk.trajectory is None:
        raise ValueError("a probe needs the visited states")
    own = [prompts[row] for row in chunk.rows[rows].tolist()]
    groups = [Group(prompt=prompt, samples=(b,), numbers=(0,)) for b, prompt in enumerate(own)]
    times = sampler.adapter.times(sampler.steps, own[0])
    weight, zeros = torch.ones(sampler.steps), torch.zeros(len(own))
    made = trajectory_points(
        groups, chunk.trajectory[:, rows], zeros, times, steps, weight, len(own) * len(looked_at(sampler.steps))
    )
    return replace(made, teacher=teacher, points=replace(made.points, x_next=None, t_next=None))


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
