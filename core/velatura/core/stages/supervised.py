"""Supervised flow matching: regress the velocity of pictures that the task provides. How a base model is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from velatura.core.alike import digest, require_same
from velatura.core.data import PromptStream
from velatura.core.encoding import Encoder
from velatura.core.errors import RecipeError
from velatura.core.learner import Learner, Tally
from velatura.core.points import MicroBatch
from velatura.core.policy import CURRENT, START
from velatura.core.rollout import by_layout
from velatura.core.seeds import generator
from velatura.core.selfcheck import self_check
from velatura.core.stages.common import StageRun, Stopwatch
from velatura.core.stages.training import Training, loss_note
from velatura.core.types import Points, Prompt

EMA = "ema"


def run(stage: StageRun) -> dict[str, Any]:
    """Train on (prompt, picture) pairs; the result is the exponential moving average of the weights."""
    config = stage.config
    training = Training(stage, sets=(EMA,), result=EMA)
    learner = Learner(
        engine=training.engine,
        policy=training.policy,
        adapter=training.adapter,
        guidance=stage.build("guidance", "none", "guidance"),
        objective=stage.build("objective", config.objective, "objective"),
        encoder=Encoder(training.adapter, training.engine.device),
        guard=training.guard,
    )
    every = stage.build("task", config.task, "task").prompts("train")
    stage.ranks.require(config.batch, stage.at("batch"))
    stream = PromptStream(every, config.batch, seed=stage.seed, at=f"stages.{stage.name}", start=training.start)

    def step(index: int) -> dict[str, float]:
        watch = Stopwatch()
        learner.encoder.forget()
        with watch.phase("data"):
            prompts = next(stream)
            if index == training.start:
                require_same(stage.ranks, {"list of prompts": digest([p.id for p in prompts])}, f"in step {index}")
            batches = micro_batches(stage, training, prompts, index)
            batches = learner.even(batches, lambda: batches[0])
        with watch.phase("update"):
            if training.policy.same(START, CURRENT):  # no weight has moved yet
                self_check(learner, batches[0])
            tally = learner.learn(batches)
        training.policy.follow(EMA, min(config.ema, (1 + index) / (10 + index)))
        return tally.reported | watch.seconds | _rows(tally)

    training.loop(step, loss_note)
    return training.finish() | training.lineage()


def _rows(tally: Tally) -> dict[str, float]:
    return {"rows/forward": float(tally.forward_rows), "rows/gradient": float(tally.gradient_rows)}


def micro_batches(stage: StageRun, training: Training, prompts: Sequence[Prompt], index: int) -> list[MicroBatch]:
    """One forward per layout; times are logit-normal, and some prompts lose their text so that guidance can work."""
    config = stage.config
    draw = generator(stage.seed, "supervised", index)
    t = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn(len(prompts), config.points, generator=draw))
    dropped = torch.rand(len(prompts), generator=draw) < config.drop_condition
    own = stage.ranks.own(range(len(prompts)))
    targets = training.adapter.latents(
        torch.stack([_target(stage, prompts[i]) for i in own]).to(training.engine.device)
    )
    noise = torch.randn((len(prompts), config.points, *targets.shape[1:]), generator=draw)
    shown = [replace(p, text="") if drop else p for p, drop in zip(prompts, dropped.tolist(), strict=True)]
    position = {i: row for row, i in enumerate(own)}
    order = sorted(own, key=lambda i: len(shown[i].sources))
    result = []
    for rows in by_layout(training.adapter, shown, order):
        at = torch.tensor(rows)
        x0 = targets[torch.tensor([position[i] for i in rows], device=targets.device)]
        result.append(_points([shown[i] for i in rows], x0, t[at].to(x0), noise[at].to(x0), t.numel()))
    return result


def _points(prompts: Sequence[Prompt], x0: Tensor, t: Tensor, noise: Tensor, total: int) -> MicroBatch:
    """K points [P K] of each of P pictures [P ...], all of a prompt's in a row."""
    rows = torch.arange(len(prompts), device=x0.device).repeat_interleave(t.shape[1])
    x0, t, noise = x0[rows], t.flatten(), noise.flatten(0, 1)
    share = t.reshape(-1, *[1] * (x0.ndim - 1))
    points = Points(
        x=(1 - share) * x0 + share * noise,
        t=t,
        advantage=torch.zeros_like(t),
        weight=torch.full_like(t, 1 / total),
        x0=x0,
        target=noise - x0,
    )
    return MicroBatch(prompts=tuple(prompts), rows=rows, points=points)


def _target(stage: StageRun, prompt: Prompt) -> Tensor:
    if prompt.target is None:
        raise RecipeError(
            f"stages.{stage.name}.task: prompt {prompt.id!r} has no target picture, and a supervised stage learns "
            f"from nothing else. Use a task that provides targets."
        )
    return prompt.target
