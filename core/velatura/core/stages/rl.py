"""Reinforcement learning: sample, judge, learn; repeat. The same loop for every objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from velatura.core.alike import plan_facts, require_same
from velatura.core.components import AdvantageEstimator, PolicyObjective, PromptFilter, TimestepSampler
from velatura.core.data import PromptStream
from velatura.core.encoding import Encoder
from velatura.core.errors import VelaturaError
from velatura.core.events import RolloutDone
from velatura.core.folding import strongest_scale
from velatura.core.gathered import whole_report
from velatura.core.judge import Judge
from velatura.core.learner import SET_OF, Learner, Tally
from velatura.core.points import Group, MicroBatch, PointNoise, forward_points, pieces, trajectory_points
from velatura.core.policy import CURRENT, START
from velatura.core.probe import Probe, start_probe
from velatura.core.rollout import Sampler, by_layout, rollout
from velatura.core.seeds import derive, generator
from velatura.core.selfcheck import self_check
from velatura.core.stages.common import StageRun, Stopwatch, kept_prompts, read_log
from velatura.core.stages.reward_metrics import counted_in, failure_metrics
from velatura.core.stages.reweighing import Reweighing, follow_policy
from velatura.core.stages.showcase import Showcase
from velatura.core.stages.training import Training
from velatura.core.steps import weighted, with_likelihood
from velatura.core.training_ledger import FILE as PROMPTS
from velatura.core.training_ledger import TrainingLedger, admission_metrics
from velatura.core.types import (
    Advantages,
    Prompt,
    RewardReport,
    Role,
    Rollout,
    RolloutPart,
    Sample,
    StepPlan,
    group_rows,
)
from velatura.core.weight_ledger import read_calibration, require_calibrated, require_prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The parts of one RL run."""

    stage: StageRun
    training: Training
    learner: Learner
    sampler: Sampler
    timesteps: TimestepSampler[Any]
    advantage: AdvantageEstimator[Any]
    prompt_filter: PromptFilter[Any] | None
    judge: Judge
    stream: PromptStream
    showcase: Showcase
    ledger: TrainingLedger
    reweighing: Reweighing | None
    probe: Probe | None
    """States under the policy that the stage started from; on the first rank, where they are asked for."""

    def step(self, index: int) -> dict[str, float]:
        """Sample, judge, learn."""
        config, watch = self.stage.config, Stopwatch()
        self.learner.encoder.forget()
        prompts = next(self.stream)
        alike = by_layout(self.sampler.adapter, prompts)
        prompts = [prompts[row] for rows in alike for row in rows]  # those of one layout side by side
        ranks = self.stage.ranks
        dealt = ranks.deal(len(prompts), config.updates_per_step)
        own = [prompts[i] for i in dealt[ranks.rank]]
        if index == self.training.start:
            self.require_same_plan(index, prompts)
        with watch.phase("rollout"), self.learner.policy.gathered():
            made, rollout_rows = self.sample(index, own)
        with watch.phase("judge"):
            judged = self.judge.report(own)
            report, rows = whole_report(ranks, judged, prompts, dealt)
        self.stage.notify("rollout_done", RolloutDone(step=index, rollout=made, report=judged, whole=report))
        admission = None if self.prompt_filter is None else self.prompt_filter.admit(report)
        admitted = report if admission is None else report.only(admission)
        self.ledger.refresh(index, report, admission)
        advantages = self.advantage.estimate(admitted)
        versions = {} if self.reweighing is None else self.reweighing.after(index, report)
        with watch.phase("update"):
            tally = self.learn(index, made, advantages.of(rows), with_signal(report, advantages), dealt[ranks.rank])
        self.learner.follow(index)
        drift = {}
        if config.probe_prompts and ((index + 1) % config.probe_every == 0 or index + 1 == config.steps):
            with watch.phase("probe"), self.learner.policy.gathered():  # the first process alone has a probe
                drift = {} if self.probe is None else self.probe.drift(self.learner)
        if (index + 1) % config.pictures_every == 0 or index + 1 == config.steps:
            with watch.phase("pictures"):
                self.showcase.draw(index + 1)
        return {
            **report_metrics(report),
            **failure_metrics(report),
            **self.judge.health,
            **admission_metrics(admission),
            **self.ledger.metrics(),
            **versions,
            **{f"advantage/{name}": value for name, value in advantages.metrics.items()},
            **tally.reported,
            **drift,
            **watch.seconds,
            "rows/rollout": float(sum(ranks.gather(rollout_rows))),
            "rows/forward": float(tally.forward_rows),
            "rows/gradient": float(tally.gradient_rows),
        }

    def sample(self, index: int, prompts: Sequence[Prompt]) -> tuple[Rollout, int]:
        """G samples of each prompt, and the transformer rows they took; prompts of one layout stand side by side. Every
        chunk goes to the judge while the next one is made."""
        parts: list[RolloutPart] = []
        samples: list[Sample] = []
        first = network_rows = 0
        for count in map(len, by_layout(self.sampler.adapter, prompts)):
            chunks = []
            own = prompts[first : first + count]
            times = self.sampler.adapter.times(self.sampler.steps, own[0])
            plan = self._plan(index, times)
            with self.learner.policy.wearing(SET_OF[self.learner.objective.requires.rollout_role]) as net:
                for chunk in rollout(net, self.sampler, own, self._seeds(index, own), plan,
                                     keep_trajectory=self._trajectories, encoder=self.learner.encoder):  # fmt: skip
                    judged = tuple(replace(sample, group=sample.group + first) for sample in chunk.samples)
                    self.judge.submit(judged)
                    chunks.append(chunk)
                    samples += judged
                    network_rows += chunk.network_rows
            parts.append(RolloutPart(
                start=parts[-1].stop if parts else 0, latents=torch.cat([chunk.latents for chunk in chunks]),
                times=times, plan=plan, trajectory=_side_by_side([chunk.trajectory for chunk in chunks]),
                log_prob=_side_by_side([chunk.log_prob for chunk in chunks]),
            ))  # fmt: skip
            first += count
        group = torch.tensor([sample.group for sample in samples])
        made = Rollout(prompts=tuple(prompts), samples=tuple(samples), group=group, parts=tuple(parts))
        return made, network_rows

    def _plan(self, index: int, times: Tensor) -> StepPlan:
        """Which steps draw noise and which are trained, the same on every rank."""
        plan = self.timesteps.plan_at(index, times, generator(self.stage.seed, "plan", index))
        if self.learner.objective.requires.stochastic_steps:
            plan = with_likelihood(plan, self.sampler.kernel, times)
        return weighted(plan, self.stage.config.step_weight, self.sampler.kernel, times)

    def require_same_plan(self, index: int, prompts: Sequence[Prompt]) -> None:
        """Every rank is about to draw the same prompts on the same grid, and to train the same steps. Collective."""
        times = self.sampler.adapter.times(self.sampler.steps, prompts[0])
        facts = plan_facts(prompts, times, self._plan(index, times))
        require_same(self.stage.ranks, facts, f"in step {index} of stage '{self.stage.name}'")

    @property
    def _trajectories(self) -> bool:
        return self.learner.objective.requires.points == "trajectory"

    def _seeds(self, index: int, prompts: Sequence[Prompt]) -> list[list[int]]:
        every = range(self.stage.config.group_size)
        return [[derive(self.stage.seed, "rollout", index, prompt.id, j) for j in every] for prompt in prompts]

    def learn(
        self, index: int, made: Rollout, advantages: Advantages, numbers: Sequence[int], mine: Sequence[int]
    ) -> Tally:
        """`updates_per_step` optimiser steps, each on its own share of the groups with signal. `numbers`: of these
        groups, on whatever rank; `mine`: of all of this rank's."""
        config = self.stage.config
        groups = groups_to_learn(made, advantages)
        updates: list[Tally] = []
        shares = [set(numbers[i :: config.updates_per_step]) for i in range(config.updates_per_step)]
        filled = [share for share in shares if share]
        for share in filled:
            own = [group for row, group in groups.items() if mine[row] in share]
            batches = self.learner.even(
                self.micro_batches(index, own, made, advantages.values),
                lambda: self.micro_batches(index, [any_group(made)], made, advantages.values, total=1)[0],
            )
            if self.learner.policy.same(START, CURRENT):  # no weight has moved yet
                self_check(self.learner, batches[0], [part.times for part in made.parts])
            updates.append(self.learner.learn(batches))
        total = Tally.of_updates(updates)
        if not updates:
            total.metrics["loss"] = 0.0
        return total

    def micro_batches(
        self, index: int, groups: Sequence[Group], made: Rollout, advantages: Tensor, total: int | None = None
    ) -> list[MicroBatch]:
        """All points of one optimiser step; several timesteps of a sample share a forward. `total`: points of the step
        over all ranks; unless given, the ranks add them up."""
        config = self.stage.config
        noise = PointNoise(seed=self.stage.seed, step=index, shared=config.share_noise)
        by_part = [(part, groups_of(part, groups)) for part in made.parts]
        if total is None:
            mine = sum(len(group.samples) * len(part.plan.train) for part, own in by_part for group in own)
            total = sum(self.stage.ranks.gather(mine))
        batches = []
        for part, own in by_part:
            known, train = advantages[part.start : part.stop], part.plan.train
            for piece in pieces(own, len(train), config.micro_batch):
                require_whole(self.learner.objective, piece, own, len(train), config.micro_batch)
                if part.trajectory is None:
                    batches.append(forward_points(
                        piece, part.latents, known, part.times, train, part.plan.weight, noise, total
                    ))  # fmt: skip
                else:
                    batches.append(trajectory_points(
                        piece, part.trajectory, known, part.times, train, part.plan.weight, total,
                        self.sampler.kernel, part.log_prob,
                    ))  # fmt: skip
        return batches


def require_whole(
    objective: PolicyObjective[Any], piece: Sequence[Group], groups: Sequence[Group], points: int, limit: int
) -> None:
    """Refuse a micro-batch with a part of a group, where the objective compares all of it.

    Raises:
        VelaturaError: with the least `micro_batch` that holds the group.
    """
    sizes = {group.prompt.id: len(group.samples) for group in groups}
    cut = [group for group in piece if len(group.samples) < sizes[group.prompt.id]]
    if objective.requires.whole_group and cut:
        size = sizes[cut[0].prompt.id] * points
        raise VelaturaError(
            f"objective '{objective.name}' compares all samples of a prompt, and those of {cut[0].prompt.id!r} have "
            f"{size} points, more than micro_batch {limit}. Set micro_batch to {size} or more, or train on fewer steps."
        )


def _side_by_side(kept: Sequence[Tensor | None]) -> Tensor | None:
    """[T b ...] of all chunks, where they kept something."""
    found = [tensor for tensor in kept if tensor is not None]
    return torch.cat(found, dim=1) if found else None


def groups_of(part: RolloutPart, groups: Sequence[Group]) -> list[Group]:
    """The groups whose samples are in `part`, counted from its start."""
    return [
        replace(group, samples=tuple(b - part.start for b in group.samples))
        for group in groups
        if part.start <= group.samples[0] < part.stop
    ]


def with_signal(report: RewardReport, advantages: Advantages) -> list[int]:
    """Numbers of the prompts with a valid advantage that is not 0: the others teach nothing."""
    moving = advantages.valid & (advantages.values != 0)
    return [p for p, rows in enumerate(group_rows(report.group, len(report.prompts))) if bool(moving[rows].any())]


def groups_to_learn(made: Rollout, advantages: Advantages) -> dict[int, Group]:
    """Row of the prompt -> its valid samples, where there are any."""
    groups = {}
    for row, (prompt, rows) in enumerate(zip(made.prompts, group_rows(made.group, len(made.prompts)), strict=True)):
        valid = [(int(b), j) for j, b in enumerate(rows) if bool(advantages.valid[b])]
        if valid:
            samples, numbers = zip(*valid, strict=True)
            groups[row] = Group(prompt=prompt, samples=samples, numbers=numbers)
    return groups


def any_group(made: Rollout) -> Group:
    """One sample of the first prompt, whatever it is worth."""
    return Group(prompt=made.prompts[0], samples=(0,), numbers=(0,))


def report_metrics(report: RewardReport) -> dict[str, float]:
    """Mean of every reward over its valid scores, spread within groups, and the share that failed."""
    metrics: dict[str, float] = {}
    for r, name in enumerate(report.names):
        valid = report.valid[:, r]
        if bool(valid.any()):
            metrics[f"reward/{name}/mean"] = float(report.scores[valid, r].mean())
        metrics[f"reward/{name}/failed"] = float(((report.status[:, r] == 1) | (report.status[:, r] == 2)).sum())
    composite = report.composite
    known = ~composite.isnan()
    if bool(known.any()):
        metrics["reward/composite"] = float(composite[known].mean())
    spreads = [float(composite[rows].std()) for rows in group_rows(report.group, len(report.prompts)) if len(rows) > 1]
    finite = [spread for spread in spreads if spread == spread]
    metrics["reward/spread_within_group"] = sum(finite) / max(1, len(finite))
    return metrics


def training_prompts(stage: StageRun) -> Sequence[Prompt]:
    """The curated prompts, or all training prompts of the task."""
    if stage.config.prompts:
        return kept_prompts(stage, stage.config.prompts)
    return stage.task_of(stage.name).prompts("train")


def calibrated_advantage(stage: StageRun, prompts: Sequence[Prompt]) -> AdvantageEstimator[Any]:
    """The stage's advantage estimator, with what its calibrate stage measured, if it has one.

    Raises:
        RecipeError: there are prompts of a category that was not calibrated.
    """
    advantage: AdvantageEstimator[Any] = stage.build("advantage", stage.config.advantage, "advantage")
    if stage.config.weights_from:
        calibration = read_calibration(stage.run_folder, stage.config.weights_from)
        require_calibrated(calibration, prompts, stage.config.weights_from, stage.at("weights_from"))
        advantage.calibrate(calibration)
    return advantage


def run(stage: StageRun) -> dict[str, Any]:
    """Train one teacher."""
    config = stage.config
    objective = stage.objective()
    training = Training.of(stage, objective, config.updates_per_step)
    learner = Learner(
        engine=training.engine,
        policy=training.policy,
        adapter=training.adapter,
        guidance=stage.build("guidance", config.guidance, "guidance"),
        objective=objective,
        encoder=Encoder(training.adapter, training.engine.device),
        guard=training.guard,
    )
    sampler = stage.sampler(training.adapter, learner.guidance)
    prompts = training_prompts(stage)
    stage.ranks.require(config.prompts_per_step, stage.at("prompts_per_step"))
    advantage = calibrated_advantage(stage, prompts)
    training.carry("advantage", advantage)
    training.carry_file(stage.folder / PROMPTS)
    with stage.judge(config.rewards, config.max_failed) as judge:
        require_prepared(advantage, judge.rewards, prompts, stage.at("advantage"))
        loop = Loop(
            stage=stage,
            training=training,
            learner=learner,
            sampler=sampler,
            timesteps=stage.build("timesteps", config.timesteps, "timesteps"),
            advantage=advantage,
            prompt_filter=config.prompt_filter and stage.build("prompt_filter", config.prompt_filter, "prompt_filter"),
            judge=judge,
            stream=PromptStream(
                prompts, config.prompts_per_step, seed=stage.seed, at=f"stages.{stage.name}", start=training.start
            ),
            showcase=Showcase(stage, training.policy, sampler, prompts),
            ledger=_ledger(stage),
            reweighing=follow_policy(stage, training, judge, advantage),
            probe=_probe(stage, training, learner, sampler, prompts),
        )
        if training.start == 0:
            loop.showcase.draw(0)
        training.loop(loop.step, _note)
    scale = strongest_scale(learner.guidance, Role.ROLLOUT)
    return training.finish() | {"guidance_scale": scale} | training.lineage() | {
        "failures": failures(stage), "failures_by_category": counted_in(read_log(stage.folder / "metrics.jsonl"))
    }  # fmt: skip


def _probe(
    stage: StageRun, training: Training, learner: Learner, sampler: Sampler, prompts: Sequence[Prompt]
) -> Probe | None:
    """The first process's states of a few prompts; none elsewhere, but all give their share of the weights."""
    count = stage.config.probe_prompts
    with training.policy.gathered():
        if not count or not stage.ranks.first:
            return None
        return start_probe(learner, sampler, prompts, count, training.initial, stage.seed)


def _ledger(stage: StageRun) -> TrainingLedger:
    """What is known of the prompts, from this stage's earlier steps or from the stage that curated them."""
    curated = stage.run_folder / stage.config.prompts / "ledger.parquet" if stage.config.prompts else None
    return TrainingLedger.open(stage.folder / PROMPTS, stage.config.group_size, curated, writes=stage.ranks.first)


def failures(stage: StageRun) -> dict[str, int]:
    """Scores that failed over the whole stage, interruptions included: summed from its log."""
    count: Counter[str] = Counter()
    for row in read_log(stage.folder / "metrics.jsonl"):
        for name, value in row.items():
            if name.startswith("reward/") and name.endswith("/failed") and value:
                count[name.removeprefix("reward/").removesuffix("/failed")] += int(value)
    return dict(count)


def _note(metrics: Mapping[str, float]) -> str:
    reward = metrics.get("reward/composite")
    return f"reward {reward:.3f}" if reward is not None else "no valid reward"
