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
from loguru import logger
from torch import Tensor

from velatura.core.alike import plan_facts, require_same
from velatura.core.components import Distiller, Task, TimestepSampler
from velatura.core.data import PromptStream
from velatura.core.encoding import Encoder
from velatura.core.folding import strongest_scale
from velatura.core.learner import SET_OF, Learner, Tally
from velatura.core.learning_checks import check_teachers
from velatura.core.points import Group, MicroBatch, pieces, trajectory_points
from velatura.core.policy import CURRENT, START
from velatura.core.probe import Probe, make_probe, probe_error
from velatura.core.rollout import Chunk, Sampler, by_layout, rollout
from velatura.core.seeds import derive, generator
from velatura.core.selfcheck import self_check
from velatura.core.stages.common import StageRun, Stopwatch, kept_prompts, manifest_of, read_weights, weights_of
from velatura.core.stages.showcase import Showcase
from velatura.core.stages.training import Training, loss_note
from velatura.core.steps import weighted, with_likelihood
from velatura.core.types import Prompt, Role, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """Where the student passed for some prompts of one layout."""

    step: int
    """Of the loop."""
    chunk: Chunk
    prompts: Sequence[Prompt]
    """What the chunk's rows count in."""
    numbers: Sequence[int]
    """Of these prompts among all of their route in this step."""
    times: Tensor
    plan: StepPlan
    of: int
    """How many prompts the route has in this step."""


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
        """The student draws a few prompts of every route, and learns what the teachers say of where it passed."""
        watch, config = Stopwatch(), self.stage.config
        self.learner.encoder.forget()
        drawn = {route: next(stream) for route, stream in self.streams.items()}
        if index == self.training.start:
            self.require_same_plan(index, drawn)
        with watch.phase("rollout"), self.learner.policy.gathered():
            visits = [v for route, prompts in drawn.items() for v in self.visit(index, route, prompts)]
        updates: list[Tally] = []
        with watch.phase("update"):
            for share in range(config.updates_per_step):
                batches = self.learner.even(
                    self.micro_batches(visits, share), lambda: self.ask(visits[0], [0], total=1)[0]
                )
                if self.learner.policy.same(START, CURRENT):  # no weight has moved yet
                    self_check(self.learner, batches[0], [visit.times for visit in visits])
                updates.append(self.learner.learn(batches))
        total = Tally.of_updates(updates)
        self.learner.follow(index)
        metrics = total.reported | {
            "rows/forward": float(total.forward_rows),
            "rows/gradient": float(total.gradient_rows),
        }
        if (index + 1) % config.probe_every == 0 or index + 1 == config.steps or index == 0:
            with watch.phase("probe"), self.learner.policy.gathered():  # the first process alone has probes
                metrics |= self.probe()
        if (index + 1) % config.pictures_every == 0 or index + 1 == config.steps:
            with watch.phase("pictures"):
                for showcase in self.showcases:
                    showcase.draw(index + 1)
        return metrics | watch.seconds

    def require_same_plan(self, index: int, drawn: Mapping[str, Sequence[Prompt]]) -> None:
        """Every rank is about to draw the same prompts on the same grids, and to train the same steps. Collective."""
        for route, prompts in drawn.items():
            times = self.sampler.adapter.times(self.sampler.steps, prompts[0])
            facts = plan_facts(prompts, times, self._plan(index, route, times))
            require_same(self.stage.ranks, facts, f"in step {index} of stage '{self.stage.name}', route '{route}',")

    def visit(self, index: int, route: str, prompts: Sequence[Prompt]) -> list[Visit]:
        """The student's own trajectories, without gradient."""
        visits, ranks = [], self.stage.ranks
        mine = ranks.deal(len(prompts), self.stage.config.updates_per_step)[ranks.rank]
        for numbers in by_layout(self.sampler.adapter, prompts, mine):
            own = [prompts[number] for number in numbers]
            seeds = [[derive(self.stage.seed, "student", index, route, prompt.id)] for prompt in own]
            times = self.sampler.adapter.times(self.sampler.steps, own[0])
            plan = self._plan(index, route, times)
            with self.learner.policy.wearing(SET_OF[self.learner.objective.requires.rollout_role]) as net:
                chunks = list(
                    rollout(net, self.sampler, own, seeds, plan, keep_trajectory=True, encoder=self.learner.encoder)
                )
            visits += [
                Visit(step=index, chunk=chunk, prompts=own, numbers=numbers, times=times, plan=plan, of=len(prompts))
                for chunk in chunks
            ]
        return visits

    def _plan(self, index: int, route: str, times: Tensor) -> StepPlan:
        """Which steps draw noise and which are trained, the same on every rank."""
        plan = self.timesteps.plan_at(index, times, generator(self.stage.seed, "plan", index, route))
        if self.learner.objective.requires.stochastic_steps:
            plan = with_likelihood(plan, self.sampler.kernel, times)
        return weighted(plan, self.stage.config.step_weight, self.sampler.kernel, times)

    def teacher(self, step: int, prompt: Prompt) -> str:
        """The weight set of the teacher that answers for a prompt in a round; of several, one drawn by weight."""
        route = self.distiller.teacher(prompt)
        mixture = self.stage.config.mixtures[route]
        if len(mixture) == 1:
            return f"teacher/{route}"
        share = torch.tensor(list(mixture.values()), dtype=torch.float64)
        drawn = torch.multinomial(share, 1, generator=generator(self.stage.seed, "teacher", step, prompt.id))
        return f"teacher/{route}/{list(mixture)[int(drawn)]}"

    def micro_batches(self, visits: Sequence[Visit], share: int) -> list[MicroBatch]:
        """Points of one optimiser step: every `updates_per_step`-th prompt of every route, routes weighing the same."""
        every = self.stage.config.updates_per_step
        batches = []
        for visit in visits:
            count = len(range(share, visit.of, every)) * len(visit.plan.train) * len(self.streams)
            chosen = [b for b, row in enumerate(visit.chunk.rows.tolist()) if visit.numbers[row] % every == share]
            batches += self.ask(visit, chosen, total=count)
        return batches

    def ask(self, visit: Visit, chosen: Sequence[int], *, total: int) -> list[MicroBatch]:
        """Micro-batches of the chosen samples of a chunk, each for one teacher."""
        chunk, train = visit.chunk, visit.plan.train
        if chunk.trajectory is None:
            raise ValueError("distillation needs the visited states")
        by_teacher: dict[str, list[Group]] = {}
        for b in chosen:
            prompt = visit.prompts[int(chunk.rows[b])]
            own = by_teacher.setdefault(self.teacher(visit.step, prompt), [])
            own.append(Group(prompt=prompt, samples=(b,), numbers=(0,)))
        zeros, weight = torch.zeros(len(chunk.rows)), visit.plan.weight
        return [
            replace(
                trajectory_points(
                    part,
                    chunk.trajectory,
                    zeros,
                    visit.times,
                    train,
                    weight,
                    total,
                    self.sampler.kernel,
                    chunk.log_prob,
                ),
                teacher=name,
            )
            for name, groups in by_teacher.items()
            for part in pieces(groups, len(train), self.stage.config.micro_batch)
        ]

    def probe(self) -> dict[str, float]:
        """Error on fixed states of each teacher's own trajectories: the student's own states move, these do not."""
        return {f"probe/{probe.route}": probe_error(self.learner, probe) for probe in self.probes}


def run(stage: StageRun) -> dict[str, Any]:
    """Train one student from several teachers."""
    config = stage.config
    distiller: Distiller[Any] = stage.build("distiller", config.distiller, "distiller")
    objective = stage.objective(distiller)
    training = Training.of(stage, objective, config.updates_per_step)
    _put_teachers(stage, training)
    guidance = stage.build("guidance", config.guidance, "guidance")
    learner = Learner(
        engine=training.engine,
        policy=training.policy,
        adapter=training.adapter,
        guidance=guidance,
        objective=objective,
        encoder=Encoder(training.adapter, training.engine.device),
        guard=training.guard,
    )
    sampler = replace(stage.sampler(training.adapter, guidance), role=Role.CURRENT)
    prompts = {route: route_prompts(stage, route) for route in config.teachers}
    check_routes(stage, distiller, prompts)
    share = max(1, config.prompts_per_step // len(prompts))
    stage.ranks.require(share, f"{stage.at('prompts_per_step')} (shared by {len(prompts)} teachers)")
    with training.policy.gathered():
        probes = [
            make_probe(learner, sampler, name, f"teacher/{name}", held_out(stage, name.partition("/")[0]), stage.seed)
            for name in config.weight_sets if stage.ranks.first
        ]  # fmt: skip
    loop = Loop(
        stage=stage, training=training, learner=learner, distiller=distiller, sampler=sampler,
        timesteps=stage.build("timesteps", config.timesteps, "timesteps"),
        streams={
            route: PromptStream(own, share, seed=derive(stage.seed, "route", route), at=f"stages.{stage.name}",
                                start=training.start)
            for route, own in prompts.items()
        },
        probes=probes,
        showcases=[Showcase(stage, training.policy, sampler, own, label=route) for route, own in prompts.items()],
    )  # fmt: skip
    if training.start == 0:
        for showcase in loop.showcases:
            showcase.draw(0)
    training.loop(loop.step, lambda m: loss_note(m, "distance to the teachers"))
    folded = strongest_scale(guidance, Role.TEACHER)
    return training.finish() | {
        "guidance_scale": 1.0, "folded": folded != 1, "folded_scale": folded,
        "teachers": {route: " + ".join(mixture) for route, mixture in config.mixtures.items()},
    }  # fmt: skip


def _put_teachers(stage: StageRun, training: Training) -> None:
    """The teachers' weights, on the CPU until they are asked; checkpoints know whose they are."""
    made = {}
    for name, source in stage.config.weight_sets.items():
        path = weights_of(stage.run_folder, source)
        training.policy.put(
            f"teacher/{name}", read_weights(path), what=f"stages.{stage.name}.teachers.{name} ({path})",
            device=torch.device("cpu"),
        )  # fmt: skip
        known = (path.parent / "manifest.json").exists()  # weights that were put there have none
        made[name] = manifest_of(stage.run_folder, source).get("output") if known else None
    training.state_fact("teachers", made)


def route_prompts(stage: StageRun, route: str) -> Sequence[Prompt]:
    """The prompts of a route: those named for it, its task's, or those its teacher was trained on."""
    if route in stage.config.tasks:
        found = task_of_route(stage, route).prompts("train")
        logger.info("{}: {} prompts of task '{}'", stage.name, len(found), stage.config.tasks[route].use)
        return found
    teacher = stage.recipe.stage(stage.config.leading[route])
    source = stage.config.prompts.get(route) or getattr(teacher, "prompts", None)
    if source:
        return kept_prompts(stage, source)
    return task_of_route(stage, route).prompts("train")


def task_of_route(stage: StageRun, route: str) -> Task[Any]:
    """The task named for a route, or its teacher's."""
    if route in stage.config.tasks:
        task: Task[Any] = stage.build("task", stage.config.tasks[route], f"tasks.{route}")
        return task
    return stage.task_of(stage.config.leading[route])


def held_out(stage: StageRun, route: str) -> list[Prompt]:
    """Evaluation prompts of a route, for the fixed probe states."""
    prompts = task_of_route(stage, route).prompts("eval")
    return [prompts[i] for i in range(min(len(prompts), stage.config.probe_prompts))]


def check_routes(stage: StageRun, distiller: Distiller[Any], prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Every prompt must have a teacher."""
    wanted = {distiller.teacher(own[i]): route for route, own in prompts.items() for i in range(len(own))}
    check_teachers(stage.recipe, stage.name, distiller, wanted)
