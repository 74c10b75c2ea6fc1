"""How the stages of a recipe depend on each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from velatura.core.calibrate_settings import CalibrateStage
from velatura.core.errors import either, suggest
from velatura.core.judge_settings import JudgeFitStage
from velatura.core.kinds import Stage
from velatura.core.merge_settings import MergeStage
from velatura.core.reward_settings import RewardRef
from velatura.core.settings import CurateStage, DistillStage, EvaluateStage, ExportStage, RLStage
from velatura.core.source import Location

BASE = "base"
"""What the adapter loads: not a stage, and every model comes from it."""
TRAINED = ("rl", "distill", "supervised", "merge")
TEACHING = ("rl", "supervised")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A stage names another."""

    at: Location
    target: str
    kinds: tuple[str, ...]
    """Kinds of stage that may stand here."""
    role: str
    """What the other is here."""
    base: bool = False
    """Whether `base` may stand here."""


def references(name: str, stage: Stage) -> Iterator[Reference]:
    """All places in which a stage names another."""
    at = ("stages", name)
    yield from _models(at, stage)
    yield from _judges(at, stage)
    yield from _choices(at, stage)
    if isinstance(stage, JudgeFitStage) and stage.rated is not None:
        yield Reference(at=(*at, "rated"), target=stage.rated, kinds=("rate",), role="a set of ratings")
    if isinstance(stage, RLStage | CurateStage) and stage.weights_from is not None:
        yield Reference(
            at=(*at, "weights_from"), target=stage.weights_from, kinds=("calibrate",), role="a set of reward weights"
        )


def _models(at: Location, stage: Stage) -> Iterator[Reference]:
    """The weights that a stage starts from, samples with, or learns from."""
    for field in ("init", "model", "baseline"):
        if hasattr(stage, field):
            target = getattr(stage, field)
            base = not isinstance(stage, ExportStage)
            yield Reference(at=(*at, field), target=target, kinds=TRAINED, role="a model", base=base)
    if isinstance(stage, EvaluateStage):
        for index, target in enumerate(stage.models):
            yield Reference(at=(*at, "models", index), target=target, kinds=TRAINED, role="a model", base=True)
    yield from _models_worn(at, stage)


def _models_worn(at: Location, stage: Stage) -> Iterator[Reference]:
    """The weights that a stage wears beside its own."""
    if isinstance(stage, DistillStage):
        for route, mixture in stage.mixtures.items():
            for target in mixture:
                where = (*at, "teachers", route) if len(mixture) == 1 else (*at, "teachers", route, target)
                yield Reference(at=where, target=target, kinds=TEACHING, role="a teacher")
    if isinstance(stage, MergeStage):
        for target in stage.models:
            yield Reference(at=(*at, "models", target), target=target, kinds=TRAINED, role="a model")
    if isinstance(stage, RLStage | DistillStage) and stage.anchor is not None:
        yield Reference(at=(*at, "anchor"), target=stage.anchor, kinds=TRAINED, role="an anchor")


def _choices(at: Location, stage: Stage) -> Iterator[Reference]:
    """The choices of prompts that a stage takes or begins with."""
    if isinstance(stage, CurateStage) and stage.after is not None:
        yield Reference(at=(*at, "after"), target=stage.after, kinds=("curate",), role="an earlier choice of prompts")
    if isinstance(stage, RLStage | CalibrateStage) and stage.prompts is not None:
        yield Reference(at=(*at, "prompts"), target=stage.prompts, kinds=("curate",), role="a choice of prompts")
    if isinstance(stage, DistillStage):
        for route, target in stage.prompts.items():
            yield Reference(at=(*at, "prompts", route), target=target, kinds=("curate",), role="a choice of prompts")


def _judges(at: Location, stage: Stage) -> Iterator[Reference]:
    """The judges that rewards ask."""
    for slot in ("rewards", "guards", "raters", "truth"):
        refs: list[RewardRef] = getattr(stage, slot, [])
        for index, ref in enumerate(refs):
            if ref.judge is not None:
                yield Reference(
                    at=(*at, slot, index, "judge"), target=ref.judge, kinds=("judge-fit",), role="a fine-tuned judge"
                )


def complaints(stages: Mapping[str, Stage]) -> Iterator[tuple[Location, str]]:
    """What is wrong with the references: unknown stages, stages of the wrong kind, cycles."""
    sound = True
    for name, stage in stages.items():
        for reference in references(name, stage):
            message = _complaint(name, reference, stages)
            if message:
                sound = False
                yield reference.at, message
    cycle = _cycle(stages) if sound else []
    if cycle:
        remedy = "A stage uses what was made before it: let one of them start from 'base', or from another stage"
        yield ("stages", cycle[0]), f"stage cycle: {' -> '.join(cycle)}. {remedy}"


def _complaint(name: str, reference: Reference, stages: Mapping[str, Stage]) -> str:
    """What is wrong with one reference; nothing, if the answer is empty."""
    target = reference.target
    fitting = [other for other, stage in stages.items() if stage.stage in reference.kinds and other != name]
    if target == BASE and reference.base:
        return ""
    if target == BASE:
        kinds = either(reference.kinds)
        hint = suggest("", fitting) if fitting else ""
        return f"'base' is what the adapter loads, untrained; {reference.role} here is a stage of kind {kinds}.{hint}"
    if target not in stages:
        return f"no stage is called {target!r}.{suggest(target, [BASE, *fitting] if reference.base else fitting)}"
    if target == name:
        here = suggest("", [BASE, *fitting] if reference.base else fitting)
        return f"stage {name!r} needs its own result. Name another.{here}"
    if stages[target].stage not in reference.kinds:
        kinds = either(reference.kinds)
        return (
            f"stage {target!r} is of kind {stages[target].stage}; {reference.role} comes from a stage of kind {kinds}."
            f"{suggest(target, fitting) if fitting else ' Add one.'}"
        )
    return ""


def dependencies(stages: Mapping[str, Stage], name: str) -> list[str]:
    """The stages whose results this one reads, in the order of the recipe."""
    stage = stages[name]
    targets = {reference.target for reference in references(name, stage)}
    if isinstance(stage, DistillStage):  # a route without prompts or a task takes those its teacher was trained on
        for route, teacher in stage.leading.items():
            origin = getattr(stages.get(teacher), "prompts", None)
            if route not in (*stage.prompts, *stage.tasks) and isinstance(origin, str):
                targets.add(origin)
    return [other for other in stages if other in targets and other != BASE]


def order(stages: Mapping[str, Stage]) -> list[str]:
    """All stages, each after those it depends on; otherwise as in the recipe."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        for other in dependencies(stages, name):
            if other not in done:
                visit(other)
        done[name] = None

    for name in stages:
        if name not in done:
            visit(name)
    return list(done)


def _cycle(stages: Mapping[str, Stage]) -> list[str]:
    """The first cycle found, closed (a, b, a); empty if there is none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for other in dependencies(stages, name):
            found = visit(other, [*path, name])
            if found:
                return found
        finished.add(name)
        return []

    for name in stages:
        found = visit(name, [])
        if found:
            return found
    return []
