"""What every stage needs: its components built, its folder, its seeds, its progress bar, its observers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from velatura.core.build import build
from velatura.core.checkpoint import write_text_atomic
from velatura.core.components import (
    Component,
    GuidancePolicy,
    Kernel,
    ModelAdapter,
    Observer,
    PolicyObjective,
    RewardModel,
    Task,
)
from velatura.core.engine import EngineConfig
from velatura.core.errors import CheckpointError, RecipeError, Stopped, located
from velatura.core.fingerprint import reward_fingerprint
from velatura.core.golden import GoldenSet
from velatura.core.interruption import INTERRUPTION
from velatura.core.judge import Judge, WeightedReward
from velatura.core.policy import Policy
from velatura.core.pulse import alive
from velatura.core.ranks import Ranks, threads_of_process
from velatura.core.recipe import Recipe, Ref, RewardRef
from velatura.core.registry import Registry
from velatura.core.rollout import Sampler
from velatura.core.score_cache import FILE as SCORES
from velatura.core.score_cache import ScoreCache
from velatura.core.summed import objective_of
from velatura.core.types import Context, Prompt
from velatura.core.weight_ledger import calibrated_weights, read_calibration

WEIGHTS = "weights.safetensors"
C = TypeVar("C", bound=Component[Any])


@dataclass(slots=True)
class StageRun:
    """One stage, about to run."""

    name: str
    config: Any
    """The stage of the recipe, defaults merged."""
    recipe: Recipe
    registry: Registry
    folder: Path
    """run/<stage>."""
    run_folder: Path
    seed: int
    """Seed of the run; stages name their own streams below it."""
    device: torch.device
    base: Path
    """Folder of the recipe."""
    console: Any = None
    """rich Console for the progress bar; None is silent."""
    observers: list[Observer[Any]] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that do this stage together."""

    def build(self, kind: str, ref: Ref | str, at: str) -> Any:
        """A component of the recipe, set up."""
        reference = Ref.model_validate({"use": ref}) if isinstance(ref, str) else ref
        component = build(self.registry, kind, reference, at=self.at(at))
        alive(f"the set-up of {kind} '{reference.use}'")
        with located(self.at(at)):
            component.setup(self.context())
        return component

    def at(self, place: str) -> str:
        """Where in the recipe `place` of this stage stands, for messages: `rewards.1`."""
        parts = [int(part) if part.isdigit() else part for part in place.split(".")]
        return self.recipe.at(("stages", self.name, *parts))

    def context(self) -> Context:
        """What components may know of the machine."""
        return Context(
            device=self.device, cache=Path.home() / ".cache" / "velatura", seed=self.seed, base=self.base,
            precision=self.recipe.engine.precision,
        )  # fmt: skip

    def adapter(self) -> ModelAdapter[Any]:
        """The adapter of this stage."""
        adapter: ModelAdapter[Any] = self.build("adapter", self.config.adapter, "adapter")
        return adapter

    def sampler(self, adapter: ModelAdapter[Any], guidance: GuidancePolicy[Any] | None = None) -> Sampler:
        """How this stage samples; under its own guidance, unless another is given."""
        return Sampler(
            adapter=adapter, guidance=guidance or self.build("guidance", self.config.guidance, "guidance"),
            kernel=self.build("kernel", self.config.kernel, "kernel"), steps=self.config.sampling.steps,
            batch=self.config.sampling.batch, solver=self.solver(),
        )  # fmt: skip

    def solver(self) -> Kernel[Any] | None:
        """What takes the steps on which nothing is drawn, where this stage names it."""
        ref = getattr(self.config, "solver", None)
        return self.build("kernel", ref, "solver") if ref is not None else None

    def objective(self, first: PolicyObjective[Any] | None = None) -> PolicyObjective[Any]:
        """What this stage learns by: the objective in its slot (`first`, if it was made before), and what is added."""
        return objective_of(self.config, self.build, self.at, first)

    def task_of(self, stage: str) -> Task[Any]:
        """The task that a stage (this one or another) takes its prompts from."""
        ref = self.recipe.task_of(stage)
        if ref is None:
            raise RecipeError(f"{self.recipe.at(('stages', stage))}: this stage has no task. Give it one.")
        task: Task[Any] = build(self.registry, "task", ref, at=self.recipe.at(("stages", stage, "task")))  # type: ignore[assignment]
        task.setup(self.context())
        return task

    def judge(self, rewards: Sequence[RewardRef], max_failed: float) -> Judge:
        """A judge over the rewards of the recipe, with their weights or those that a calibrate stage found."""
        weights = self._weights(rewards)
        return Judge(
            [self.reward(ref, f"rewards.{i}", *weights[i]) for i, ref in enumerate(rewards)], max_failed=max_failed,
            ranks=self.ranks,
        )  # fmt: skip

    def reward(
        self, ref: RewardRef, place: str, weight: float = 1.0, by_category: Mapping[str, float] | None = None, *,
        label: str | None = None, again: bool = False,
    ) -> WeightedReward:  # fmt: skip
        """One reward, set up, with all that the recipe says of it. `again`: it is to be asked what was asked before, so
        that kept scores would be no answer, and its golden set was looked at."""
        ref = ref.opened(self.run_folder)
        model: RewardModel[Any] = self.build("reward", ref, place)
        cache = None
        if not again and (model.cached if ref.cache is None else ref.cache):
            known = reward_fingerprint(self.registry, ref, self.context(), model)
            cache = ScoreCache(self.run_folder / SCORES, known, self.base)
        return WeightedReward(
            label=label or ref.label, at=self.at(place), model=model, weight=weight,
            weight_by_category=by_category or {}, breaker=ref.breaker, cache=cache, threads=ref.threads,
            golden=GoldenSet.load(ref.golden, self.base) if ref.golden and not again else None,
        )  # fmt: skip

    def _weights(self, rewards: Sequence[RewardRef]) -> list[tuple[float, Mapping[str, float]]]:
        """Weight and weight by category of each reward. Curation compares raw scores, so there weights of standardised
        ones are divided by the spread of their reward."""
        source = getattr(self.config, "weights_from", None)
        if source is None:
            return [(ref.weight, ref.weight_by_category) for ref in rewards]
        calibration, raw = read_calibration(self.run_folder, source), self.config.stage == "curate"
        known = set(next(iter(calibration.weights.values())))
        return [
            (0.0, calibrated_weights(calibration, ref.label, raw=raw))
            if ref.label in known
            else (ref.weight, ref.weight_by_category)
            for ref in rewards
        ]

    def engine_config(self) -> EngineConfig:
        """The engine of the recipe."""
        engine = self.recipe.engine
        return EngineConfig(**engine.model_dump(exclude={"timeout"}) | {"threads": threads_of_process(engine.threads)})

    def load_policy(self, adapter: ModelAdapter[Any], source: str) -> Policy:
        """The network wearing the weights of a stage, or of the base."""
        alive(f"loading the network of adapter '{adapter.name}'")
        with located(self.at("adapter")):
            net = adapter.load(self.device)
        policy = Policy(net)
        if source != "base":
            path = weights_of(self.run_folder, source)
            policy.load(read_weights(path), what=str(path))
        return policy

    def notify(self, event_name: str, event: object) -> None:
        """Tell every observer."""
        for observer in self.observers:
            getattr(observer, event_name)(event)

    def asked_to_stop(self) -> str:
        """The signal that asked any of the processes to stop; empty where none did. Collective."""
        return next((name for name in self.ranks.gather(INTERRUPTION.signal) if name), "")

    def leave_if_asked(self) -> None:
        """Wait for every rank; where any was asked to stop, all of them do. Collective.

        Raises:
            Stopped: what was finished is on disk.
        """
        if asked := self.asked_to_stop():
            raise Stopped(f"{asked}: stage '{self.name}' is saved as far as it is done")

    @contextmanager
    def progress(self, total: int, done: int = 0, unit: str = "") -> Iterator[Ticker]:
        """A progress bar for this stage."""
        columns = (
            SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console, disable=self.console is None) as bars:
            task = bars.add_task(self.name, total=total, completed=done, unit=unit, note="")
            yield Ticker(bars, task)


@dataclass(slots=True)
class Ticker:
    """Moves one progress bar."""

    bars: Progress
    task: Any

    def tick(self, note: str = "", steps: int = 1) -> None:
        """One step further, with a short note."""
        alive(f"{self.bars.tasks[0].description}, {self.bars.tasks[0].completed + steps:g} done")
        self.bars.update(self.task, advance=steps, note=note)


def weights_of(run_folder: Path, stage: str) -> Path:
    """The finished weights of a stage.

    Raises:
        CheckpointError: the stage has none.
    """
    path = run_folder / stage / WEIGHTS
    if not path.exists():
        raise CheckpointError(f"stage '{stage}' has no finished weights at {path}. Run it first.")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of finished weights.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not what the stage left ({error}). Put it back, or do the stage again: velatura run RECIPE "
            f"--stage {path.parent.name} --fresh"
        ) from error


def manifest_of(run_folder: Path, stage: str) -> dict[str, Any]:
    """What a finished stage says of itself."""
    path = run_folder / stage / "manifest.json"
    if not path.exists():
        raise CheckpointError(f"stage '{stage}' has not run: {path} is missing")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


class MetricsLog:
    """`metrics.jsonl`: one JSON object a step. Lines after the step a resumed run starts from are cut off."""

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] < start]
        write_text_atomic(path, "".join(line + "\n" for line in kept))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step."""
        row = {"step": step} | {name: round(float(value), 6) for name, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _lines(path: Path) -> list[str]:
    """Complete lines of a log; a line cut off by a kill is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    lines = text.split("\n")
    return [line for line in lines[:-1] if line]


def read_log(path: Path) -> list[dict[str, float]]:
    """The steps of a `metrics.jsonl`."""
    return [json.loads(line) for line in _lines(path)]


class Stopwatch:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"time/{name}_s"] = self.seconds.get(f"time/{name}_s", 0.0) + time.perf_counter() - start


def kept_prompts(run: StageRun, curate: str) -> list[Prompt]:
    """The prompts that a curate stage kept, in the order of its task.

    Raises:
        CheckpointError: the ledger names prompts that the task does not have.
    """
    path = run.run_folder / curate / "kept.json"
    if not path.exists():
        raise CheckpointError(f"stage '{curate}' has no finished prompt list at {path}. Run it first.")
    wanted = set(json.loads(path.read_text())["prompt_ids"])
    train = run.task_of(curate).prompts("train")
    kept = [prompt for prompt in (train[i] for i in range(len(train))) if prompt.id in wanted]
    if len(kept) != len(wanted):
        raise CheckpointError(
            f"{path} keeps {len(wanted)} prompts, but the task of stage '{curate}' has only {len(kept)} of them. "
            f"The task changed since: run '{curate}' again."
        )
    if not kept:
        raise RecipeError(f"stage '{curate}' kept no prompt at all. Lower its prompt_filter's threshold.")
    logger.info("{}: {} prompts from '{}'", run.name, len(kept), curate)
    return kept
