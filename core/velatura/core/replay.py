"""An update that was not taken, once more: what in it is not finite?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from velatura.core.commands import open_run, stage_run
from velatura.core.encoding import Encoder
from velatura.core.engine import EngineConfig, OptimizerConfig, make_engine
from velatura.core.engine.protocol import Engine
from velatura.core.errors import VelaturaError
from velatura.core.guard import FOLDER
from velatura.core.judge_model import JudgeModel
from velatura.core.kept_batches import FACTS, Kept, KeptUpdate, read_kept, read_parts
from velatura.core.kept_pictures import KeptPictures, pictures_of
from velatura.core.learner import Learner, Tally
from velatura.core.points import MicroBatch
from velatura.core.policy import Policy
from velatura.core.stages.common import StageRun
from velatura.core.types import Points, Role

REPLAYED = ("rl", "supervised", "distill", "judge-fit")
"""Kinds of stage whose updates are kept."""
GUIDED = ("rl", "distill")
SHOWN = 8
"""Names of one kind in a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A micro-batch that was computed again."""

    rank: int
    number: int
    loss: float
    points: tuple[str, ...]
    """What is not finite, point by point; of a judge, picture by picture."""
    parameters: tuple[str, ...]
    """Names of the parameters whose gradient is not finite."""
    trained: int
    """How many parameters there are."""

    @property
    def finite(self) -> bool:
        """Whether there is nothing to find fault with."""
        return not self.points and not self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """All that was kept of an update, computed again."""

    facts: Mapping[str, Any]
    weights: tuple[str, ...]
    """Names of trained tensors that are not finite themselves."""
    batches: tuple[Finding, ...]

    @property
    def finite(self) -> bool:
        """Whether everything came out finite this time."""
        return not self.weights and all(batch.finite for batch in self.batches)


def replay(folder: Path) -> Replayed:
    """Load what was kept in RUN/STAGE/nonfinite/step-..., and compute loss and gradient of each micro-batch again, in
    this process and in the precision of the run.

    Raises:
        VelaturaError: it is not such a folder, or the run it belongs to cannot be opened.
    """
    if not (folder / FACTS).exists():
        there = sorted(str(path.parent) for path in folder.glob(f"**/{FOLDER}/*/{FACTS}"))
        raise VelaturaError(
            f"{folder} is not an update that was kept: it has no {FACTS}. "
            + (f"There is: {', '.join(there)}." if there else f"Runs keep them in RUN/STAGE/{FOLDER}/.")
        )
    folder = folder.resolve()
    stage = stage_run(open_run(folder.parents[2]), folder.parents[1].name)
    if stage.config.stage not in REPLAYED:
        raise VelaturaError(f"a stage of kind {stage.config.stage} cannot be replayed; {', '.join(REPLAYED)} can.")
    if stage.config.stage == "judge-fit":
        return _judged_again(stage, read_parts(folder, pictures_of))
    kernel = stage.build("kernel", stage.config.kernel, "kernel") if hasattr(stage.config, "kernel") else None
    kept = read_kept(folder, kernel)
    learner = _learner(stage, kept)
    return _replayed(kept, [_again(learner, part) for part in kept.batches])


def _replayed(kept: KeptUpdate[Any], batches: Sequence[Finding]) -> Replayed:
    weights = tuple(name for name, value in kept.weights.items() if not bool(torch.isfinite(value).all()))
    return Replayed(facts=kept.facts, weights=weights, batches=tuple(batches))


def _engine(stage: StageRun, net: nn.Module, kept: KeptUpdate[Any]) -> tuple[Policy, Engine]:
    """A network wearing the weights of that moment, in plain torch: there is one process."""
    policy = Policy(net)
    policy.load(kept.weights, what="what was kept of the update")
    engine = stage.recipe.engine
    config = EngineConfig(kind="local", precision=engine.precision, device=engine.device, threads=engine.threads)
    return policy, make_engine(policy.net, config, OptimizerConfig(lr=stage.config.optimizer.lr))


def _learner(stage: StageRun, kept: KeptUpdate[Kept]) -> Learner:
    adapter = stage.adapter()
    policy, made = _engine(stage, adapter.load(stage.device), kept)
    guidance = stage.config.guidance if stage.config.stage in GUIDED else "none"
    return Learner(
        engine=made, policy=policy, adapter=adapter, guidance=stage.build("guidance", guidance, "guidance"),
        objective=stage.objective(), encoder=Encoder(adapter, made.device),
    )  # fmt: skip


def _again(learner: Learner, part: Kept) -> Finding:
    """Loss and gradient of one micro-batch, and what in them is not finite."""
    device = learner.engine.device
    batch = MicroBatch(
        prompts=part.batch.prompts, rows=part.batch.rows.to(device), points=_on(part.batch.points, device),
        teacher=part.batch.teacher,
    )  # fmt: skip
    frozen = {role: None if value is None else value.to(device) for role, value in part.frozen.items()}
    velocity = learner.velocities(batch, Tally(), frozen)
    loss = learner.objective.loss(batch.points, velocity)
    learner.engine.backward(loss.value, last=True)
    gradients = dict(learner.engine.gradients())
    learner.engine.zero_grad()
    return Finding(
        rank=part.rank, number=part.number, loss=float(loss.value.detach()),
        points=tuple(_points(learner, batch, {role: value.detach() for role, value in velocity.items()})),
        parameters=tuple(name for name, value in gradients.items() if _odd(value)),
        trained=len(gradients),
    )  # fmt: skip


def _judged_again(stage: StageRun, kept: KeptUpdate[KeptPictures]) -> Replayed:
    """Loss and gradient of a judge's micro-batches."""
    model: JudgeModel[Any] = stage.build("judge_model", stage.config.judge_model, "judge_model")
    _, engine = _engine(stage, model.load(stage.device), kept)
    found = []
    for part in kept.batches:
        loss = model.loss(engine.module, part.rated)
        engine.backward(loss.value, last=True)
        gradients = dict(engine.gradients())
        engine.zero_grad()
        found.append(Finding(
            rank=part.rank, number=part.number, loss=float(loss.value.detach()), trained=len(gradients),
            points=tuple(_pictures(model, engine.module, part)),
            parameters=tuple(name for name, value in gradients.items() if _odd(value)),
        ))  # fmt: skip
    return _replayed(kept, found)


def _pictures(model: JudgeModel[Any], net: nn.Module, part: KeptPictures) -> list[str]:
    """For each picture in which something is not finite, looked at alone: which one it is, and what."""
    found = []
    for n, row in enumerate(part.rated):
        images = (row.sample.image, *row.sample.prompt.sources)
        odd = ["picture"] if any(map(_odd, images)) else []
        with torch.no_grad():
            odd += ["loss"] if _odd(model.loss(net, [row]).value) else []
        if odd:
            found.append(f"picture {n} (of {row.sample.prompt.text!r}, rated {row.mean:g}): {', '.join(odd)}")
    return found


def _points(learner: Learner, batch: MicroBatch, velocity: Mapping[Role, Tensor]) -> list[str]:
    """For each point in which something is not finite: which one it is, and what."""
    found = []
    for n, row in enumerate(batch.rows.tolist()):
        one = _one(batch.points, n)
        odd = [f.name for f in fields(Points) if f.name != "log_prob" and _odd(getattr(one, f.name))]
        odd += [f"velocity of {role}" for role, value in velocity.items() if _odd(value[n])]
        loss = learner.objective.loss(one, {role: value[n : n + 1] for role, value in velocity.items()}).value
        odd += ["loss"] if _odd(loss) else []
        if odd:
            prompt = batch.prompts[row].id
            found.append(f"point {n} (prompt {prompt!r}, t = {float(one.t[0]):.4f}): {', '.join(odd)}")
    return found


def _one(points: Points, n: int) -> Points:
    """One of N points."""
    return _mapped(points, lambda value: value[n : n + 1])


def _on(points: Points, device: torch.device) -> Points:
    return _mapped(points, lambda value: value.to(device))


def _mapped(points: Points, change: Callable[[Tensor], Tensor]) -> Points:
    given: dict[str, Any] = {f.name: getattr(points, f.name) for f in fields(Points)}
    changed: dict[str, Any] = {name: change(value) for name, value in given.items() if isinstance(value, Tensor)}
    return replace(points, **changed)


def _odd(value: object) -> bool:
    return isinstance(value, Tensor) and not bool(torch.isfinite(value).all())


def told(replayed: Replayed) -> str:
    """What was found, for people."""
    facts = replayed.facts
    lines = [f"stage '{facts['stage']}', step {facts['step']}, update {facts['update']}: {facts['faults'][0]}"]
    if replayed.weights:
        lines.append(f"weights that are not finite: {_some(replayed.weights)}")
    for batch in replayed.batches:
        state = "all is finite" if batch.finite else "not finite"
        lines.append(f"process {batch.rank}, micro-batch {batch.number}: {state}, loss {batch.loss:.6g}")
        lines += [f"  {text}" for text in batch.points[:SHOWN]]
        lines += [f"  and {len(batch.points) - SHOWN} more"] if len(batch.points) > SHOWN else []
        if batch.parameters:
            count = f"{len(batch.parameters)} of {batch.trained}"
            lines.append(f"  gradient not finite for {count} parameters: {_some(batch.parameters)}")
    if replayed.finite:
        lines.append(
            "here everything is finite: the cause lay in what one process does not repeat, such as another device, or "
            "a sum over processes that overflowed"
        )
    return "\n".join(lines)


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
