"""What the training stages share: engine, policy, checkpoints, metrics, and the end of a run."""

from __future__ import annotations

import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from loguru import logger
from safetensors.torch import save_file
from torch import Tensor

from velatura.core import __version__
from velatura.core.alike import digest, require_same, require_same_weights
from velatura.core.checkpoint import Checkpoint, load_latest, save_checkpoint
from velatura.core.components import ModelAdapter, PolicyObjective
from velatura.core.engine import OptimizerConfig, make_engine
from velatura.core.engine.protocol import Engine
from velatura.core.errors import CheckpointError, Stopped, VelaturaError
from velatura.core.events import CheckpointSaved, RunEnd, RunStart, StepEnd
from velatura.core.guard import Guard
from velatura.core.learner import FOLLOWING, SET_OF, sets_for
from velatura.core.policy import CURRENT, START, Policy
from velatura.core.pulse import alive
from velatura.core.random_state import generators_state, restore_generators, seed_generators
from velatura.core.stages.common import (
    WEIGHTS,
    MetricsLog,
    StageRun,
    Ticker,
    manifest_of,
    read_log,
    read_weights,
    weights_of,
)
from velatura.core.types import Role

CARRIED = "memory-"
"""Sections of a checkpoint that hold what components remember begin with this."""


class Remembers(Protocol):
    """Something whose memory is part of a checkpoint."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """What it remembers."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""


class Training:
    """State of a looping stage: what is saved, restored, logged and finished."""

    def __init__(
        self, run: StageRun, *, sets: tuple[str, ...], fixed: tuple[str, ...] = (), updates_per_step: int = 1,
        policy: Policy | None = None, result: str = CURRENT,
    ) -> None:  # fmt: skip
        """`sets`: weight sets that start as copies of the initial weights, follow them, and are part of a checkpoint;
        `fixed`: that stay as they start, so that a resumed run has them from where it started; `policy`: what is
        trained, where that is not the picture model of the recipe; `result`: the set that `finish` writes."""
        self.run = run
        self.config = run.config
        seed_generators(run.seed, run.name, run.ranks.rank)
        if policy is None:
            self.adapter: ModelAdapter[Any] = run.adapter()
            policy = run.load_policy(self.adapter, self.config.init)
        self.policy: Policy = policy
        self._sets, self._fixed, self._result = sets, fixed, result
        self.initial = {name: value.to("cpu", copy=True) for name, value in self.policy.weights().items()}
        optimizer = OptimizerConfig(**self.config.optimizer.model_dump(), total=self.config.steps * updates_per_step)
        # engines give all ranks the first one's weights, so that different files must be found before
        require_same_weights(run.ranks, self.policy.net, f"at the start of stage '{run.name}'")
        alive("the start of the engine")
        self.engine: Engine = make_engine(self.policy.net, run.engine_config(), optimizer)
        self.policy.gathered = self.engine.whole
        for name in (*sets, *fixed):
            self.policy.remember(name, follows=name in sets)
        self.policy.mark_same(START, CURRENT)
        self._carried: dict[str, Remembers] = {}
        self._facts: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        self._found = load_latest(self._checkpoints, run.ranks)
        self.start = 0 if self._found is None else self._resume(self._found)
        skipped = [row.get("skipped", 0) for row in read_log(run.folder / "metrics.jsonl") if row["step"] < self.start]
        self.guard = Guard(
            name=run.name, folder=run.folder, ranks=run.ranks, policy=self.policy, limit=self.config.max_skipped,
            at=run.at("max_skipped"), before=int(sum(skipped)),
        )  # fmt: skip
        self.log = MetricsLog(run.folder / "metrics.jsonl", start=self.start) if run.ranks.first else None

    @classmethod
    def of(cls, run: StageRun, objective: PolicyObjective[Any], updates_per_step: int) -> Training:
        """With the weight sets that an objective asks for, the anchor among them.

        Raises:
            CheckpointError: the anchor is of another model.
        """
        needed, following = sets_for(objective), {SET_OF[role] for role in FOLLOWING}
        training = cls(
            run, sets=tuple(sorted(needed & following)), fixed=tuple(sorted(needed - following)),
            updates_per_step=updates_per_step,
        )  # fmt: skip
        if Role.ANCHOR in objective.roles():
            path = weights_of(run.run_folder, run.config.anchor)
            training.policy.put(
                SET_OF[Role.ANCHOR], read_weights(path), what=f"{run.at('anchor')} ({path})", device=torch.device("cpu")
            )
        return training

    @property
    def _checkpoints(self) -> Path:
        return self.run.folder / "checkpoints"

    def _resume(self, found: Checkpoint) -> int:
        what = f"the checkpoint at step {found.step} in {self._checkpoints}"
        self.policy.load(found.tensors["policy"], what=what)
        for name in self._sets:
            self.policy.put(name, found.tensors[f"set-{name}"], what=what, follows=True)
        for name in (*self._sets, *self._fixed, START):
            if found.state["same_as_current"].get(name):
                self.policy.mark_same(name, CURRENT)
        self.engine.load_state_dict(found.tensors["optimizer"])
        known = list(found.state.get("observers", ()))
        for observer in self.run.observers:  # others may have come, gone or changed places
            own = next((state for state in known if state["use"] == observer.name), None)
            if own is not None:
                known.remove(own)
                observer.load_state_dict(own["state"])
        logger.info("{}: goes on from step {}", self.run.name, found.step)
        return int(found.step)

    def carry(self, name: str, component: Remembers) -> None:
        """What `component` remembers is part of every checkpoint from now on, and comes from the one resumed from."""
        section = CARRIED + name
        self._carried[section] = component
        if self._found is not None and section in self._found.tensors:
            component.load_state_dict(self._found.tensors[section])

    def carry_file(self, path: Path) -> None:
        """A file that the stage goes on writing, like a ledger, is part of every checkpoint from now on; a run that is
        resumed has it as it was then."""
        self._files[path.name] = path
        kept = None if self._found is None else self._found.file(path.name)
        if kept is not None and self.run.ranks.first:
            temporary = path.with_name(f".{path.name}.tmp")
            shutil.copyfile(kept, temporary)
            temporary.replace(path)
        self.run.ranks.barrier()

    def state_fact(self, name: str, value: Any) -> None:
        """Say what a checkpoint only fits with, such as which teacher answers for which route.

        Raises:
            CheckpointError: the run is resumed from one that was made with something else.
        """
        self._facts[name] = value
        before = value if self._found is None else self._found.state.get("facts", {}).get(name, value)
        if before != value:
            raise CheckpointError(
                f"the checkpoint at step {self.start} in {self._checkpoints} was made with {name} {before}, and now "
                f"there is {value}. Put that back, or do the stage again: velatura run RECIPE --stage {self.run.name} "
                "--fresh"
            )

    def save(self, step: int) -> None:
        """A complete checkpoint after `step` steps, of which every process writes its share. Collective."""
        ranks, result = self.run.ranks, {self._result}
        shared = {name: self.policy.sets[name] for name in self._sets if name not in result}
        single: dict[str, Mapping[str, Tensor]] = {f"random-{ranks.rank}": generators_state()}
        if ranks.first:
            single |= {f"set-{name}": self.policy.sets[name] for name in self._sets if name in result}
            single |= {name: memory for name, own in self._carried.items() if (memory := own.state_dict())}
        with self.engine.whole():
            if ranks.first:
                single["policy"] = {name: value.to("cpu", copy=True) for name, value in self.policy.weights().items()}
        folder = save_checkpoint(
            self._checkpoints, step,
            {
                "optimizer": self.engine.state_dict(self._writes),
                **{f"set-{name}": {k: v for k, v in own.items() if self._writes(k)} for name, own in shared.items()},
            },
            self._state(), keep=self.config.keep_checkpoints, keep_every=self.config.keep_every, single=single,
            files={name: path for name, path in self._files.items() if path.exists()}, ranks=ranks,
        )  # fmt: skip
        self.run.notify("checkpoint_saved", CheckpointSaved(step=step, folder=folder))

    def _writes(self, name: str) -> bool:
        """Whether this process is the one that writes the tensor of this name."""
        ranks = self.run.ranks
        return zlib.crc32(name.encode()) % ranks.size == ranks.rank

    def _state(self) -> dict[str, Any]:
        """What of a checkpoint is no tensor."""
        return {
            "stage": self.run.name,
            "seed": self.run.seed,
            "processes": self.run.ranks.size,
            "same_as_current": {name: self.policy.same(name, CURRENT) for name in (*self._sets, *self._fixed, START)},
            "observers": [{"use": observer.name, "state": observer.state_dict()} for observer in self.run.observers],
            "facts": self._facts,
        }

    def loop(self, step: Callable[[int], dict[str, float]], note: Callable[[Mapping[str, float]], str]) -> None:
        """Run `step` until all steps are done, saving as the recipe says; observers hear of everything."""
        total = self.config.steps
        self._require_alike()
        mine, found = f"random-{self.run.ranks.rank}", self._found
        if found is not None and mine in found.tensors:  # only now: whatever is set up before may draw
            restore_generators(found.tensors[mine])
        self._found = None  # its files may go now
        self.run.notify("run_start", RunStart(
            stage=self.run.name, kind=self.config.stage, folder=self.run.folder, step=self.start, total=total,
            config=self.config.model_dump(by_alias=True),
        ))  # fmt: skip
        self._done = self.start
        try:
            with self.run.progress(total, self.start, unit="steps") as bar:
                for index in range(self.start, total):
                    self._one(index, step, note, bar)
        except Exception as error:
            self.run.notify("run_end", RunEnd(step=self._done, error=str(error)))
            raise
        self.run.notify("run_end", RunEnd(step=total))

    def _one(
        self,
        index: int,
        step: Callable[[int], dict[str, float]],
        note: Callable[[Mapping[str, float]], str],
        bar: Ticker,
    ) -> None:
        self.guard.begin(index)
        begin = time.perf_counter()
        metrics = step(index) | self.guard.metrics
        self._done = done = index + 1
        metrics["time/step_s"] = time.perf_counter() - begin
        if self.log is not None:
            self.log.add(index, metrics)
        self.run.notify("step_end", StepEnd(step=index, metrics=metrics))
        self.guard.require_budget()
        asked = self.run.asked_to_stop()
        if done < self.config.steps and (asked or done % self.config.checkpoint_every == 0):
            self.save(done)
        bar.tick(note(metrics))
        if done < self.config.steps and asked:
            raise Stopped(f"{asked}: stage '{self.run.name}' is saved after step {done} of {self.config.steps}")

    def _require_alike(self) -> None:
        """All processes are about to do the same, from the same weights."""
        ranks, when = self.run.ranks, f"before the first update of stage '{self.run.name}'"
        require_same(ranks, {
            "recipe": digest([self.config.model_dump(), self.run.recipe.engine.model_dump(), self.run.seed]),
            "first step": str(self.start),
            "version of Velatura": __version__,
            "version of torch": torch.__version__,
        }, when)  # fmt: skip
        with self.engine.whole():
            require_same_weights(ranks, self.policy.net, when)

    def lineage(self) -> dict[str, Any]:
        """What the result inherits from where it started: a student's folded guidance stays folded."""
        if self.config.init == "base":
            return {"folded": False}
        before = manifest_of(self.run.run_folder, self.config.init)["result"]
        return {key: before[key] for key in ("folded", "folded_scale", "teachers") if key in before}

    def finish(self) -> dict[str, Any]:
        """Write the final weights and say what they are. Collective."""
        with self.engine.whole():
            made = self.policy.weights() if self._result == CURRENT else self.policy.sets[self._result]
            final = {name: value.to("cpu", copy=True).contiguous() for name, value in made.items()}
        if not all(bool(torch.isfinite(value).all()) for value in final.values()):
            raise VelaturaError(f"stage '{self.run.name}' ended with weights that are not finite; nothing was saved")
        if self.run.ranks.first:
            temporary = self.run.folder / f".{WEIGHTS}.tmp"
            save_file(final, temporary, metadata={"stage": self.run.name})
            temporary.replace(self.run.folder / WEIGHTS)
        self.save(self.config.steps)
        change = torch.stack([(final[n] - self.initial[n]).float().norm() for n in final]).norm()
        size = torch.stack([self.initial[n].float().norm() for n in final]).norm()
        return {"steps": self.config.steps, "relative_change": float(change / size)}


def loss_note(metrics: Mapping[str, float], what: str = "loss") -> str:
    """What a progress bar says of a step."""
    return f"{what} {metrics['loss']:.4f}" if "loss" in metrics else "no update"
