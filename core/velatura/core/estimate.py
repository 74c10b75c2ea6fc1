"""What a run would cost: transformer rows, seconds and bytes of each stage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from velatura.core.build import build
from velatura.core.components import GuidancePolicy, Kernel, ModelAdapter, TimestepSampler
from velatura.core.folding import folded_scale
from velatura.core.probe import looked_at
from velatura.core.recipe import Recipe
from velatura.core.registry import Registry
from velatura.core.routes import LOOK, Look, routes_of_models
from velatura.core.seeds import generator
from velatura.core.summed import objective_of
from velatura.core.types import Prompt, Role

TRIED = 128
"""Rows in one forward when speed is measured, at most."""
SHARED = 16
"""Rows of a prompt, when speed is measured: its prefix is computed once for them."""
REPEATS = 5
"""Times that a batch is measured, at most."""
PATIENCE = 4.0
"""Seconds after which a measurement ends, about."""
LARGE = 50e6
"""Parameters of a network that is not tried."""
HEAVY = 1e12
"""Parameters times numbers in a sample of a row that is not tried: it would take many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Transformer rows: one row is one sample at one time through the network, a guidance branch counted singly."""

    forward: int = 0
    """Without gradient."""
    gradient: int = 0
    """With forward and backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Samples of one kind of prompts, in one step of a looping stage or in the whole of another."""

    prompt: Prompt
    """One of them: edits carry source images through the network, so a row of theirs costs more."""
    samples: int
    rows: Rows


def work(recipe: Recipe, registry: Registry, name: str, adapter: ModelAdapter[Any], look: Look) -> list[Work]:
    """What a stage does, by kind of prompts."""
    stage: Any = recipe.stage(name)
    split = "eval" if stage.stage == "evaluate" else "train"
    prompts = {route: look(ref, split) for route, ref in recipe.tasks_of(name).items()}
    if stage.stage == "evaluate":
        return _evaluation(recipe, registry, name, adapter, prompts, look)
    totals = {"rl": lambda: stage.prompts_per_step * stage.group_size, "supervised": lambda: stage.batch,
              "distill": lambda: len(prompts) * max(1, stage.prompts_per_step // len(prompts))}  # fmt: skip
    found = []
    for own in prompts.values():
        if stage.stage in ("curate", "rate"):
            samples = _counted(own, stage.max_prompts) * stage.group_size
        elif stage.stage == "calibrate":
            kinds = len({category for prompt in islice(own, LOOK) for category in prompt.membership})
            samples = _counted(own, stage.groups * kinds) * stage.group_size
        else:
            samples = totals[stage.stage]() // len(prompts)
        for prompt, part in _kinds(own, samples):
            found.append(Work(prompt=prompt, samples=part, rows=_rows(registry, stage, adapter, prompt, part)))
    if stage.stage == "rl":
        found += [part for own in prompts.values() for part in _probe(registry, stage, adapter, own, 1)]
    if stage.stage == "distill":
        for route, ref in recipe.tasks_of(name).items():
            found += _probe(registry, stage, adapter, look(ref, "eval"), len(stage.mixtures[route]))
    return found


def _probe(
    registry: Registry, stage: Any, adapter: ModelAdapter[Any], prompts: Sequence[Prompt], models: int
) -> list[Work]:
    """Forwards that measure progress on fixed states of `models` models, as their mean over the stage's steps; the
    first process makes them while the others wait."""
    guidance, learns = _guidance(registry, stage), stage.stage == "rl"
    draws = Role.ROLLOUT if learns else Role.TEACHER
    answers = Role.CURRENT if learns else Role.TEACHER
    measured = {i for i in range(stage.steps) if (i + 1) % stage.probe_every == 0 or i + 1 == stage.steps}
    count = len(measured if learns else measured | {0})
    found = []
    for prompt, part in _kinds(prompts, min(len(prompts), stage.probe_prompts) * models):
        times = adapter.times(stage.sampling.steps, prompt)
        points = times[looked_at(stage.sampling.steps)]
        now = _per_point(guidance, Role.CURRENT, points) if learns else 1
        each = _per_sample(guidance, draws, _asked(registry, stage, times))
        each += len(points) * (_per_point(guidance, answers, points) + count * now)
        found.append(Work(prompt=prompt, samples=0, rows=Rows(forward=-(-part * each // stage.steps))))
    return [part for part in found if part.rows.forward]


def _evaluation(
    recipe: Recipe,
    registry: Registry,
    name: str,
    adapter: ModelAdapter[Any],
    prompts: dict[str, Sequence[Prompt]],
    look: Look,
) -> list[Work]:
    """Each model on its own routes; a student with guidance folded in takes one row where others take two."""
    stage: Any = recipe.stage(name)
    found = []
    for model, routes in routes_of_models(recipe, name, prompts, look).items():
        guided = stage.guide_folded or folded_scale(recipe, registry, model) == 1
        for route in routes:
            samples = _counted(prompts[route], stage.max_prompts) * stage.seeds_per_prompt
            for prompt, part in _kinds(prompts[route], samples):
                times = _asked(registry, stage, adapter.times(stage.sampling.steps, prompt))
                each = _per_sample(_guidance(registry, stage), Role.ROLLOUT, times) if guided else len(times)
                found.append(Work(prompt=prompt, samples=part, rows=Rows(forward=part * each)))
    return found


def _counted(prompts: Sequence[Prompt], limit: int | None) -> int:
    return min(len(prompts), limit or len(prompts))


def _kinds(prompts: Sequence[Prompt], samples: int) -> Iterator[tuple[Prompt, int]]:
    """A prompt of each kind among the first, and its part of the samples; the parts add up."""
    first: dict[str, Prompt] = {}
    counts: Counter[str] = Counter()
    for prompt in islice(prompts, LOOK):
        first.setdefault(prompt.task, prompt)
        counts[prompt.task] += 1
    left = samples
    for place, (kind, prompt) in enumerate(first.items(), start=1):
        part = left if place == len(first) else round(samples * counts[kind] / counts.total())
        left -= part
        yield prompt, part


def _guidance(registry: Registry, stage: Any) -> GuidancePolicy[Any]:
    guidance: GuidancePolicy[Any] = build(registry, "guidance", stage.guidance)  # type: ignore[assignment]
    return guidance


def _per_sample(guidance: GuidancePolicy[Any], role: Role, times: Tensor) -> int:
    """Rows of one sample over all steps."""
    return int((1 + (guidance.scale(role, times) != 1).long()).sum())


def _per_point(guidance: GuidancePolicy[Any], role: Role, times: Tensor) -> int:
    """Rows of one state point among those at `times`, which go through together."""
    return 2 if bool((guidance.scale(role, times) != 1).any()) else 1


def _asked(registry: Registry, stage: Any, times: Tensor) -> Tensor:
    """The times at which a rollout asks for a velocity: those of the grid, and where a solver asks twice, some more."""
    kernel: Kernel[Any] = build(registry, "kernel", stage.kernel)  # type: ignore[assignment]
    zeros, asked = torch.zeros(1), list(times[:-1])
    for t, t_next in pairwise(times):
        midway = kernel.midway(zeros, zeros, t, t_next)
        asked += [] if midway is None else [midway.t]
    return torch.stack(asked)


def _rows(registry: Registry, stage: Any, adapter: ModelAdapter[Any], prompt: Prompt, samples: int) -> Rows:
    """Rows of `samples` samples of a stage that trains or curates."""
    if stage.stage == "supervised":
        return Rows(gradient=samples * stage.points)
    guidance, times = _guidance(registry, stage), adapter.times(stage.sampling.steps, prompt)
    if stage.stage in ("curate", "calibrate", "rate"):
        return Rows(forward=samples * _per_sample(guidance, Role.ROLLOUT, _asked(registry, stage, times)))
    timesteps: TimestepSampler[Any] = build(registry, "timesteps", stage.timesteps)  # type: ignore[assignment]
    trained = len(timesteps.plan(times, generator(0)).train)
    role = Role.ROLLOUT if stage.stage == "rl" else Role.CURRENT
    objective = objective_of(stage, lambda kind, ref, _: build(registry, kind, ref))

    frozen = sum(_per_point(guidance, other, times[:-1]) for other in objective.roles() if other is not Role.CURRENT)
    return Rows(
        forward=samples * _per_sample(guidance, role, _asked(registry, stage, times)) + samples * trained * frozen,
        gradient=samples * trained * _per_point(guidance, Role.CURRENT, times[:-1]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSeconds:
    """What a transformer row takes on this machine, its share of the prompt's prefix included."""

    forward: float
    gradient: float
    """Forward and backward."""


class Speed:
    """How fast networks are here, each measured once for each kind of prompts."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads
        self._known: dict[str, RowSeconds | None] = {}

    def seconds(self, adapter: ModelAdapter[Any], part: Work) -> float | None:
        """Of the rows of `part`; None for a network too large to try."""
        key = f"{adapter.name} {adapter.options.model_dump_json()} {part.prompt.task}"
        if key not in self._known:
            with _threads(self.threads):
                self._known[key] = seconds_per_row(adapter, part.prompt, torch.device("cpu"))
        row = self._known[key]
        return None if row is None else row.forward * part.rows.forward + row.gradient * part.rows.gradient


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch with as many threads as the run would have."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_per_row(
    adapter: ModelAdapter[Any], prompt: Prompt, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> RowSeconds | None:
    """Measured on a batch of as many rows as there is time for; None where a single one would take too long.

    The batch is doubled from one row on. Of less than `SHARED` rows each bears more of the prompt's prefix than in a
    run, so that what is slow is rather thought to be slower. `clock` says how many seconds have gone by.
    """
    parameters = float(adapter.describe().get("parameters", 0))
    if parameters > LARGE or parameters * adapter.noise([prompt], [0]).numel() > HEAVY:
        return None
    trial = _Trial(adapter, prompt, device, clock)
    rows, taken = 1, trial.learning(1)
    while rows < TRIED and 2 * taken * (REPEATS + 3) < PATIENCE:
        rows *= 2
        taken = trial.learning(rows)
    calls = min(REPEATS, int(PATIENCE / 2 / taken)) if taken > 0 else REPEATS
    forward = median(trial.forward(rows) for _ in range(max(1, calls)))
    gradient = median([trial.learning(rows) for _ in range(calls)] or [taken])
    return RowSeconds(forward=forward / rows, gradient=gradient / rows)


class _Trial:
    """A network that is timed on rows of one kind of prompts."""

    def __init__(
        self, adapter: ModelAdapter[Any], prompt: Prompt, device: torch.device, clock: Callable[[], float]
    ) -> None:
        self.adapter, self.prompt, self.clock = adapter, prompt, clock
        self.net = adapter.load(device)
        self.told = adapter.encode([prompt] * max(1, TRIED // SHARED))

    def forward(self, count: int) -> float:
        """Seconds that `count` rows take without gradient."""
        with torch.no_grad():
            return self._seconds(count, lambda v: None)

    def learning(self, count: int) -> float:
        """Seconds that `count` rows take forward and backward."""
        return self._seconds(count, lambda v: v.square().mean().backward())  # type: ignore[no-untyped-call]

    def _seconds(self, count: int, then: Callable[[Tensor], None]) -> float:
        prompts = max(1, count // SHARED)
        x = self.adapter.noise([self.prompt] * count, list(range(count)))
        t, rows = torch.full((count,), 0.5), torch.arange(count) % prompts
        told = self.told.select(torch.arange(prompts))
        begin = self.clock()
        then(self.adapter.velocity(self.net, x, t, self.adapter.prepare(self.net, told), rows))
        return self.clock() - begin
