"""On-policy distillation: the student draws, the routed teacher says which way it would have gone.

Loss: mean squared difference of the student's *conditional* velocity and the teacher's *guided* velocity at the states
the student itself visits (Qwen-Image-2.0-RL, arXiv:2606.27608, section on OPD). Guidance is thereby folded into the
student, which samples at scale 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from velatura.core.components import Distiller, TimestepSampler
from velatura.core.data import PromptStream
from velatura.core.encoding import Encoder
from velatura.core.errors import RecipeError
from velatura.core.learner import Learner
from velatura.core.points import Group, MicroBatch, pieces, trajectory_points
from velatura.core.policy import CURRENT
from velatura.core.probe import Probe, make_probe, probe_error
from velatura.core.rollout import Chunk, Sampler, by_layout, rollout
from velatura.core.seeds import derive, generator
from velatura.core.stages.common import StageRun, Stopwatch, kept_prompts, read_weights, weights_of
from velatura.core.stages.showcase import Showcase
from velatura.core.stages.training import Training
from velatura.core.types import Prompt, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The parts of one distillation."""

    stage: StageRun
    training: Training
    learner: Learner
    distiller: Distiller[Any]
    sampler: Sampler
    timesteps: TimestepSampler[Any]
    streams: Mapping[str, PromptStream]
    """Route -> its own prompts: the route is chosen first, then a prompt of that route."""
    probes: Sequence[Probe]
    showcases: Sequence[Showcase]

    def step(self, index: int) -> dict[str, float]:
        """The student draws a few prompts of every route; one optimiser step on what the teachers say."""
        watch, config = Stopwatch(), self.stage.config
        self.learner.encoder.forget()
        batches: list[MicroBatch] = []
        with watch.phase("rollout"):
            for route, stream in self.streams.items():
                batches += self.visit(index, route, next(stream))
        batches = [replace(b, points=replace(b.points, weight=b.points.weight / len(self.streams))) for b in batches]
        with watch.phase("update"):
            tally = self.learner.learn(batches)
        metrics = tally.metrics | {
            "rows/forward": float(tally.forward_rows),
            "rows/gradient": float(tally.gradient_rows),
        }
        if (index + 1) % config.probe_every == 0 or index + 1 == config.steps or index == 0:
            with watch.phase("probe"):
                metrics |= self.probe()
        if (index + 1) % config.pictures_every == 0 or index + 1 == config.steps:
            with watch.phase("pictures"):
                for showcase in self.showcases:
                    showcase.draw(index + 1)
        return metrics | watch.seconds

    def visit(self, index: int, route: str, prompts: Sequence[Prompt]) -> list[MicroBatch]:
        """The student's own trajectories, without gradient, cut into points to ask the teacher about."""
        alike = by_layout(self.sampler.adapter, prompts)
        return [b for rows in alike for b in self._visit(index, route, [prompts[row] for row in rows], len(prompts))]

    def _visit(self, index: int, route: str, prompts: Sequence[Prompt], count: int) -> list[MicroBatch]:
        """Those of one layout, `count` being all prompts of the route."""
        seeds = [[derive(self.stage.seed, "student", index, route, prompt.id)] for prompt in prompts]
        times = self.sampler.adapter.times(self.sampler.steps, prompts[0])
        plan = self.timesteps.plan(times, generator(self.stage.seed, "plan", index, route))
        with self.learner.policy.wearing(CURRENT) as net:
            chunks = list(
                rollout(net, self.sampler, prompts, seeds, plan, keep_trajectory=True, encoder=self.learner.encoder)
            )
        return [
            batch
            for chunk in chunks
            for batch in self.ask(chunk, prompts, times, plan.train, plan.weight, total=count * len(plan.train))
        ]

    def ask(
        self, chunk: Chunk, prompts: Sequence[Prompt], times: Tensor, train: Tensor, weight: Tensor, *, total: int
    ) -> list[MicroBatch]:
        """Micro-batches of one chunk, each for one teacher."""
        if chunk.trajectory is None:
            raise ValueError("distillation needs the visited states")
        by_teacher: dict[str, list[Group]] = {}
        for b, row in enumerate(chunk.rows.tolist()):
            name = f"teacher/{self.distiller.teacher(prompts[row])}"
            by_teacher.setdefault(name, []).append(Group(prompt=prompts[row], samples=(b,), numbers=(0,)))
        zeros = torch.zeros(len(chunk.rows))
        return [
            replace(trajectory_points(part, chunk.trajectory, zeros, times, train, weight, total), teacher=name)
            for name, groups in by_teacher.items()
            for part in pieces(groups, len(train), self.stage.config.micro_batch)
        ]

    def probe(self) -> dict[str, float]:
        """Error on fixed states of each teacher's own trajectories: the student's own states move, these do not."""
        return {f"probe/{probe.route}": probe_error(self.learner, probe) for probe in self.probes}


def run(stage: StageRun) -> dict[str, Any]:
    """Train one student from several teachers."""
    config = stage.config
    training = Training(stage, sets=())
    for name, source in config.teachers.items():
        path = weights_of(stage.run_folder, source)
        training.policy.put(
            f"teacher/{name}", read_weights(path), what=f"stages.{stage.name}.teachers.{name} ({path})",
            device=torch.device("cpu"),
        )  # fmt: skip
    distiller = stage.build("distiller", config.distiller, "distiller")
    guidance = stage.build("guidance", config.guidance, "guidance")
    learner = Learner(
        engine=training.engine,
        policy=training.policy,
        adapter=training.adapter,
        guidance=guidance,
        objective=distiller,
        encoder=Encoder(training.adapter, training.engine.device),
    )
    kernel = stage.build("kernel", config.kernel, "kernel")
    sampler = Sampler(
        adapter=training.adapter, guidance=guidance, kernel=kernel, steps=config.sampling.steps,
        batch=config.sampling.batch, role=Role.CURRENT,
    )  # fmt: skip
    prompts = {route: route_prompts(stage, route) for route in config.teachers}
    check_routes(stage, distiller, prompts)
    share = max(1, config.prompts_per_step // len(prompts))
    loop = Loop(
        stage=stage, training=training, learner=learner, distiller=distiller, sampler=sampler,
        timesteps=stage.build("timesteps", config.timesteps, "timesteps"),
        streams={
            route: PromptStream(own, share, seed=derive(stage.seed, "route", route), at=f"stages.{stage.name}",
                                start=training.start)
            for route, own in prompts.items()
        },
        probes=[make_probe(learner, sampler, route, f"teacher/{route}", held_out(stage, route), stage.seed)
                for route in prompts],
        showcases=[Showcase(stage, training.policy, sampler, own, label=route) for route, own in prompts.items()],
    )  # fmt: skip
    if training.start == 0:
        for showcase in loop.showcases:
            showcase.draw(0)
    training.loop(loop.step, lambda m: f"distance to the teachers {m['loss']:.4f}")
    folded = float(guidance.scale(Role.TEACHER, torch.tensor([0.5])))
    return training.finish() | {
        "guidance_scale": 1.0, "folded": folded != 1, "folded_scale": folded, "teachers": dict(config.teachers),
    }  # fmt: skip


def route_prompts(stage: StageRun, route: str) -> Sequence[Prompt]:
    """The prompts of a route: those named for it, or those its teacher was trained on."""
    teacher = stage.recipe.stage(stage.config.teachers[route])
    source = stage.config.prompts.get(route) or getattr(teacher, "prompts", None)
    if source:
        return kept_prompts(stage, source)
    return stage.task_of(stage.config.teachers[route]).prompts("train")


def held_out(stage: StageRun, route: str) -> list[Prompt]:
    """Evaluation prompts of a route, for the fixed probe states."""
    prompts = stage.task_of(stage.config.teachers[route]).prompts("eval")
    return [prompts[i] for i in range(min(len(prompts), stage.config.probe_prompts))]


def check_routes(stage: StageRun, distiller: Distiller[Any], prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Every prompt must have a teacher."""
    for route, own in prompts.items():
        wanted = {distiller.teacher(own[i]) for i in range(len(own))}
        missing = sorted(wanted - set(stage.config.teachers))
        if missing:
            raise RecipeError(
                f"stages.{stage.name}.teachers: distiller '{distiller.name}' sends prompts of route '{route}' to "
                f"teacher '{missing[0]}', which is not configured. There is: {', '.join(stage.config.teachers)}."
            )
