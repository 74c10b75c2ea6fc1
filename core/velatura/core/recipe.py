"""A recipe: a pipeline of named stages, read from YAML and checked as far as that goes without any plugin."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from velatura.core import graph
from velatura.core.base_settings import Ref, Settings, Whole
from velatura.core.calibrate_settings import CalibrateStage, mismatches
from velatura.core.errors import RecipeError, either, prefixed, suggest
from velatura.core.explain import complaints, keys
from velatura.core.judge_settings import JudgeFitStage, RateStage
from velatura.core.kinds import Stage
from velatura.core.reward_settings import RewardRef
from velatura.core.settings import (
    CurateStage,
    DistillStage,
    Engine,
    EvaluateStage,
    ExportStage,
    Optimizer,
    RLStage,
    Sampling,
    SupervisedStage,
)
from velatura.core.source import Key, Location, Source, assign, parse_override, read

__all__ = [
    "SLOTS",
    "CalibrateStage",
    "CurateStage",
    "DistillStage",
    "Engine",
    "EvaluateStage",
    "ExportStage",
    "JudgeFitStage",
    "Optimizer",
    "RLStage",
    "RateStage",
    "Recipe",
    "Ref",
    "RewardRef",
    "Sampling",
    "Stage",
    "SupervisedStage",
    "content_hash",
    "load_recipe",
    "recipe_schema",
]

SLOTS = {
    "adapter": "adapter",
    "task": "task",
    "tasks": "task",
    "guidance": "guidance",
    "kernel": "kernel",
    "timesteps": "timesteps",
    "rewards": "reward",
    "guards": "reward",
    "raters": "reward",
    "truth": "reward",
    "judge_model": "judge_model",
    "advantage": "advantage",
    "objective": "objective",
    "plus": "objective",
    "solver": "kernel",
    "distiller": "distiller",
    "prompt_filter": "prompt_filter",
    "evaluators": "evaluator",
    "observers": "observer",
}
"""Slot of a stage -> kind of the component (or components) in it."""

MERGED = ("sampling", "optimizer")
"""Settings that a stage takes over field by field from the top; a slot is taken over as a whole."""

STAGE_CLASSES = {get_args(c.model_fields["stage"].annotation)[0]: c for c in get_args(get_args(Stage)[0])}
"""Kind of stage -> its class."""


class Recipe(Settings):
    """What `velatura run` does: stages, and defaults that they share."""

    _source: Source | None = PrivateAttr(None)

    seed: Whole = Field(0, description="Every random number of the run follows from it.")
    output: str | None = Field(None, description="Run folder; runs/<name of the recipe file> when left out.")
    plugins: list[str] = Field(
        default_factory=list, description="Python files that are plugins, relative to the recipe: ./my_reward.py"
    )
    engine: Engine = Engine()
    adapter: Ref | None = Field(
        None, description="The network. Like all slots below, for every stage that has none of its own."
    )
    task: Ref | None = None
    guidance: Ref | None = Field(
        None,
        description="Default for the stages that guide their samples: curate, calibrate, rl, evaluate. A distill stage "
        "has its own, which says how its teachers are asked.",
    )
    kernel: Ref | None = None
    timesteps: Ref | None = None
    rewards: list[RewardRef] | None = None
    advantage: Ref | None = None
    objective: Ref | None = None
    distiller: Ref | None = None
    prompt_filter: Ref | None = None
    evaluators: list[Ref] | None = None
    observers: list[Ref] | None = None
    sampling: Sampling | None = None
    optimizer: Optimizer | None = None
    stages: dict[str, Stage] = Field(
        min_length=1, description="Name -> stage; an order is found from their references."
    )

    @model_validator(mode="before")
    @classmethod
    def _share_defaults(cls, data: Any) -> Any:
        """Fill the slots that a stage leaves out with those at the top."""
        if not isinstance(data, dict) or not isinstance(data.get("stages"), dict):
            return data
        return {**data, "stages": {name: _with_defaults(stage, data) for name, stage in data["stages"].items()}}

    def model_post_init(self, context: Any) -> None:
        """Remember the text, for messages."""
        self._source = context if isinstance(context, Source) else None

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        found = [*self._misnamed(), *graph.complaints(self.stages), *mismatches(self.stages)]
        if found:
            raise RecipeError("\n".join(dict.fromkeys(prefixed(self.at(place), message) for place, message in found)))
        return self

    def _misnamed(self) -> Iterator[tuple[Location, str]]:
        """Names that cannot be used for what they name."""
        for name, stage in self.stages.items():
            if name == graph.BASE or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                reason = (
                    "it stands for the model that everything starts from" if name == graph.BASE else "it is a folder"
                )
                yield ("stages", name), f"a stage cannot have this name: {reason}. Use letters, digits, '_' and '-'"
            seen: set[str] = set()
            for index, reward in enumerate(getattr(stage, "rewards", ())):
                if reward.label in seen:
                    message = f"two rewards are called {reward.label!r}; give one of them another 'name'"
                    yield ("stages", name, "rewards", index), message
                seen.add(reward.label)
            if isinstance(stage, CalibrateStage):
                yield from ((("stages", name, *place), message) for place, message in stage.complaints())
        for index, plugin in enumerate(self.plugins):
            if not plugin.endswith(".py"):
                message = f"{plugin!r} is not a .py file; an installed plugin is used by naming it: 'use: {plugin}/...'"
                yield ("plugins", index), message

    @property
    def file(self) -> str:
        """The file that it was read from, for messages."""
        return self._source.name if self._source else "RECIPE"

    @property
    def folder(self) -> Path:
        """Where relative paths in options start: the folder of the recipe."""
        return Path(self._source.name).parent if self._source else Path()

    def at(self, location: Location) -> str:
        """A place for messages, `recipe.yaml:12: stages.a.rewards.0`, where it was written: in the stage or above."""
        if self._source is None:
            return ".".join(str(part) for part in location)
        return self._source.at(_as_written(self._source, location))

    def line_of(self, location: Location) -> int | None:
        """The line on which exactly this was written in the file; None where it was not, or is not known."""
        if self._source is None:
            return None
        place = _as_written(self._source, location)
        return None if self._source.at(place).startswith("command line") else self._source.lines.get(place)

    def stage(self, name: str) -> Stage:
        """The stage of this name, defaults filled in."""
        if name not in self.stages:
            raise RecipeError(f"no stage is called {name!r}.{suggest(name, self.stages)}")
        return self.stages[name]

    def dependencies(self, name: str) -> list[str]:
        """The stages whose results this one reads, in the order of the recipe."""
        return graph.dependencies(self.stages, name)

    def order(self) -> list[str]:
        """All stages, each after those it depends on; otherwise as in the recipe."""
        return graph.order(self.stages)

    def task_of(self, name: str) -> Ref | None:
        """The task whose prompts a stage trains on or curates."""
        stage = self.stage(name)
        if isinstance(stage, RLStage | CalibrateStage) and stage.prompts is not None:
            return self.task_of(stage.prompts)
        known = CurateStage | CalibrateStage | RLStage | SupervisedStage | RateStage
        return stage.task if isinstance(stage, known) else None

    def tasks_of(self, name: str) -> dict[str, Ref]:
        """Route -> task of the prompts that a stage uses.

        A distill stage has the routes of its teachers; an evaluate stage its own, or those of all other stages; a
        stage with one task has one route, called like the stage.
        """
        stage = self.stage(name)
        if isinstance(stage, EvaluateStage):
            return dict(stage.tasks) or self._all_tasks()
        if isinstance(stage, DistillStage):
            return self._tasks_behind(stage) | stage.tasks
        task = self.task_of(name)
        return {name: task} if task else {}

    def _tasks_behind(self, stage: DistillStage) -> dict[str, Ref]:
        """Route -> task of the prompts that its teacher was trained on, or that were chosen for it."""
        origins = {route: stage.prompts.get(route, teacher) for route, teacher in stage.leading.items()}
        return {route: task for route, origin in origins.items() if (task := self.task_of(origin))}

    def _all_tasks(self) -> dict[str, Ref]:
        """Every task once; its route is what a distill stage calls it, otherwise the first stage that has it.

        Tasks of supervised stages count where there are no others: what a base model learns from is no test. Nor do
        those that a distill stage has of its own: a student is measured where its teachers are.
        """
        found: dict[str, Ref] = {}
        for kinds in (("distill",), ("curate", "calibrate", "rl"), ("supervised",)):
            if kinds == ("supervised",) and found:
                break
            for name, stage in ((name, stage) for name, stage in self.stages.items() if stage.stage in kinds):
                own = self._tasks_behind(stage) if isinstance(stage, DistillStage) else self.tasks_of(name)
                found |= {r: t for r, t in own.items() if r not in found and t not in found.values()}
        return found

    def references(self) -> Iterator[tuple[Location, str, Ref]]:
        """Every component of every stage: place, kind, reference."""
        for name, stage in self.stages.items():
            for slot, kind in SLOTS.items():
                value = getattr(stage, slot, None)
                for place, ref in _refs(value):
                    yield ("stages", name, slot, *place), kind, ref

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default of the recipe filled in, and nothing left at the top that a stage has."""
        keep = {"seed", "output", "plugins", "engine", "stages"}
        return self.model_dump(mode="json", by_alias=True, include=keep)


def _refs(value: Any) -> Iterator[tuple[Location, Ref]]:
    """The references in a slot: one, a list, or a mapping."""
    if isinstance(value, Ref):
        yield (), value
    elif isinstance(value, list):
        yield from (((index,), ref) for index, ref in enumerate(value))
    elif isinstance(value, dict):
        yield from (((key,), ref) for key, ref in value.items())


def _with_defaults(stage: Any, top: dict[str, Any]) -> Any:
    """A stage as data, with the slots it leaves out."""
    known = _class_of(stage)
    if known is None:
        return stage
    merged = dict(stage)
    for slot in known.model_fields:
        if not _takes_over(known, slot) or top.get(slot) is None or (slot == "task" and stage.get("prompts")):
            continue
        own = merged.setdefault(slot, top[slot])
        if slot in MERGED and isinstance(own, dict) and isinstance(top[slot], dict):
            merged[slot] = {**top[slot], **own}
    return merged


def _takes_over(stage: type[Settings] | None, slot: str) -> bool:
    """Whether the top of the recipe has the default of this field of a stage.

    Guidance of a distill stage is another thing than that of the others: it is how teachers are asked, and what is
    folded into the student.
    """
    if stage is not None and (slot not in stage.model_fields or (stage is DistillStage and slot == "guidance")):
        return False
    return slot in SLOTS or slot in MERGED


def _class_of(stage: Any) -> type[Settings] | None:
    """The class of a stage that is still plain data."""
    return STAGE_CLASSES.get(str(stage.get("stage"))) if isinstance(stage, dict) else None


def _as_written(source: Source, location: Location) -> Location:
    """Where a value of a stage was really written: there, or among the defaults at the top."""
    stages = source.data.get("stages")
    if location[:1] != ("stages",) or len(location) < 3 or not isinstance(stages, dict):
        return location
    if not _takes_over(_class_of(stages.get(location[1])), str(location[2])):
        return location
    inherited = location[2:]
    depth = 2 if inherited[0] in MERGED else 1
    here = source.has(location[: 2 + depth])
    return location if here or not source.has(inherited[:depth]) else inherited


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `a.b.c=value` overrides, and say with line numbers what is wrong with it."""
    path = Path(path)
    source = read(path)
    for override in overrides:
        location, value = parse_override(override)
        _make_room(source, location)
        assign(source, location, value)
    if source.data.get("output") is None:
        source.data["output"] = f"runs/{path.stem}"
    try:
        return Recipe.model_validate(source.data, context=source)
    except ValidationError as error:
        raise RecipeError("\n".join(dict.fromkeys(_lines(error, source)))) from error


def _lines(error: ValidationError, source: Source) -> Iterator[str]:
    """What is wrong, one line each."""
    missing: dict[Key, list[Location]] = {}
    for location, message in complaints(error, Recipe, "key"):
        if message.startswith("this key is missing") and location[-1] in Recipe.model_fields and len(location) == 3:
            missing.setdefault(location[-1], []).append(location[:-1])
        elif message.startswith("no such key") and (told := _of_another_place(source, location, message)):
            yield prefixed(source.at(location), told)
        else:
            yield prefixed(source.at(_as_written(source, location)), message)
    for key, (stage, *others) in missing.items():
        more = f"; stages {', '.join(str(other[1]) for other in others)} lack it, too" if others else ""
        advice = f"{key!r} is missing; give it here, or once at the top of the recipe for every stage{more}"
        yield prefixed(source.at(stage), advice)


def _of_another_place(source: Source, location: Location, message: str) -> str | None:
    """What to say of a key of a stage that only the top of a recipe has, like `engine`, or only stages of other kinds;
    None for other keys."""
    if len(location) != 3 or location[0] != "stages":
        return None
    key, stage = str(location[2]), source.data["stages"].get(location[1])
    own = keys(_class_of(stage)) if _class_of(stage) else []
    kinds = [kind for kind, known in STAGE_CLASSES.items() if key in keys(known)]
    if kinds:
        return f"no such key in a stage of kind {stage['stage']}; those of kind {either(kinds)} have it.{message[12:]}"
    above = [key for key in keys(Recipe) if all(key not in known.model_fields for known in STAGE_CLASSES.values())]
    near = next(iter(get_close_matches(key, [*own, *above], n=1)), "")
    here = ".".join(map(str, location))
    advice = f"no such key. {near!r} stands at the top of the recipe, for all stages: write {near}, not {here}"
    return advice if near in above else None


def _make_room(source: Source, location: Location) -> None:
    """Write out what a stage takes over from the top or by default, so that an override can change a part of it."""
    stages = source.data.get("stages")
    if location[0] != "stages" or len(location) < 3 or not isinstance(stages, dict):
        return
    name, slot = str(location[1]), str(location[2])
    if name not in stages:
        raise RecipeError(f"command line: no stage is called {name!r}.{suggest(name, map(str, stages))}")
    stage = stages[name]
    known = _class_of(stage)
    if known is None or len(location) < 4 or slot in stage or slot not in SLOTS or slot not in known.model_fields:
        return
    default = known.model_fields[slot].get_default(call_default_factory=True)
    if source.data.get(slot) is not None and _takes_over(known, slot):
        stage[slot] = copy.deepcopy(source.data[slot])
    elif isinstance(default, Ref):
        stage[slot] = default.model_dump(by_alias=True)


def content_hash(data: Any) -> str:
    """SHA-256 of plain data, independent of the order of keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors. What a stage may take over from the top is not required in it."""
    schema = Recipe.model_json_schema(by_alias=True)
    for stage in STAGE_CLASSES.values():
        definition = schema["$defs"][stage.__name__]
        definition["required"] = [key for key in definition["required"] if key not in Recipe.model_fields]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
