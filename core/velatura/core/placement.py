"""From a stage of a recipe to what is where: its batches as the stage would make them, each rehearsed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from itertools import islice
from typing import Any

import torch

from velatura.core.build import build
from velatura.core.components import GuidancePolicy, ModelAdapter, PolicyObjective, TimestepSampler
from velatura.core.footprint import Batch, Rehearsal
from velatura.core.learner import FOLLOWING, SET_OF, sets_for
from velatura.core.memory import (
    CPU,
    FP32,
    USED,
    MemoryPlan,
    Part,
    Sharding,
    chunk,
    dtype_of,
    engine_parts,
    larger,
    micro_batch,
    set_parts,
)
from velatura.core.policy import Policy
from velatura.core.probe import looked_at, together
from velatura.core.recipe import Recipe
from velatura.core.registry import Registry
from velatura.core.routes import LOOK, Look
from velatura.core.seeds import generator
from velatura.core.stages.evaluate import BLOCK
from velatura.core.stages.showcase import PROMPTS, SEEDS
from velatura.core.summed import objective_of
from velatura.core.types import Prompt, Role

FROZEN = {"vae": "autoencoder"}
"""Names of a pipeline's parts, as people say them."""
TRAINING = ("rl", "distill", "supervised")


class Placement:
    """The memory of a recipe's stages; equal work is rehearsed once."""

    def __init__(self, recipe: Recipe, registry: Registry, world_size: int = 1) -> None:
        """`world_size`: how many GPUs the stages would be spread over."""
        self.recipe, self.registry = recipe, registry
        self.sharding = Sharding.of(recipe.engine, world_size)
        self._rehearsals: dict[str, Rehearsal | None] = {}
        self._known: dict[str, Any] = {}

    def plan(self, name: str, adapter: ModelAdapter[Any], look: Look) -> MemoryPlan | None:
        """What the stage `name` keeps where; None where the adapter does not know its footprint."""
        stage: Any = self.recipe.stage(name)
        split = "eval" if stage.stage == "evaluate" else "train"
        prompts = [look(ref, split) for ref in self.recipe.tasks_of(name).values()]
        kinds = {prompt.task: (prompt, own) for own in prompts for prompt in islice(own, LOOK)}
        plans = []
        for prompt, own in kinds.values():
            rehearsal = self._rehearsal(adapter, prompt, trains=stage.stage in TRAINING)
            if rehearsal is None:
                return None
            plans.append(_Stage(self, stage, adapter, rehearsal, prompt, len(own), len(prompts)).plan())
        return reduce(larger, plans)

    def _rehearsal(self, adapter: ModelAdapter[Any], prompt: Prompt, *, trains: bool) -> Rehearsal | None:
        shapes = [tuple(source.shape) for source in prompt.sources]
        key = f"{adapter.name} {adapter.options.model_dump_json()} {prompt.task} {prompt.size} {shapes} {trains}"
        if key not in self._rehearsals:
            found = adapter.footprint(prompt)
            precision = self.recipe.engine.precision
            loaded = next(found.net.parameters()).dtype if found is not None else torch.float32
            dtype = dtype_of(precision) if trains else loaded
            self._rehearsals[key] = None if found is None else Rehearsal(adapter, found, prompt, dtype)
        return self._rehearsals[key]

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """What `measure` says, asked once for each `key`."""
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]


class _Stage:
    """One stage on prompts of one kind."""

    def __init__(
        self, place: Placement, stage: Any, adapter: ModelAdapter[Any], rehearsal: Rehearsal, prompt: Prompt,
        prompts: int, routes: int,
    ) -> None:  # fmt: skip
        self.place, self.stage, self.adapter = place, stage, adapter
        self.rehearsal, self.prompt, self.routes = rehearsal, prompt, routes
        self.guidance: GuidancePolicy[Any] = place_build(place, "guidance", getattr(stage, "guidance", "none"))
        self.prompts, self.group = self._counts(prompts)

    def plan(self) -> MemoryPlan:
        """Everything."""
        parts = self._weights() + self._frozen()
        if self.stage.stage != "supervised":
            parts += self._samples()
        if self.stage.stage in TRAINING:
            parts.append(Part(name="forwards and backward of an update", size=self._update(), where=USED,
                              phases=("update",)))  # fmt: skip
            parts.append(Part(name="forwards of other roles", size=self._others(), where=USED, phases=("others",)))
        parts.append(Part(name="encoded prompts", size=self._told()))
        return MemoryPlan.of(parts, self.place.sharding.world_size)

    def _counts(self, available: int) -> tuple[int, int]:
        """Prompts that are drawn together, at most, and samples of each."""
        stage = self.stage
        if stage.stage == "rl":
            return stage.prompts_per_step, stage.group_size
        if stage.stage in ("curate", "calibrate", "rate"):
            return max(1, stage.sampling.batch // stage.group_size), stage.group_size
        if stage.stage == "distill":
            return max(1, stage.prompts_per_step // len(stage.teachers)), 1
        if stage.stage == "evaluate":
            return min(BLOCK, stage.max_prompts or available, available), stage.seeds_per_prompt
        return stage.batch, 1

    @property
    def _role(self) -> Role:
        return Role.CURRENT if self.stage.stage == "distill" else Role.ROLLOUT

    def _guided(self, role: Role) -> bool:
        return bool((self.guidance.scale(role, torch.full((1,), 0.5)) != 1).any())

    def _weights(self) -> list[Part]:
        """The network, its optimiser and its roles."""
        rehearsal, stage = self.rehearsal, self.stage
        if stage.stage not in TRAINING:
            return [Part(name="transformer weights", size=rehearsal.weights)]
        parts = engine_parts(rehearsal.net, rehearsal.weights, self.place.sharding, stage.optimizer.kind)
        trained = sum(rehearsal.trained.values())
        teachers = list(stage.weight_sets) if stage.stage == "distill" else []
        teachers += ["anchor"] if getattr(stage, "anchor", None) else []
        worn = bool(self._probed)  # the weights of the start, once more
        return parts + set_parts(
            trained, rehearsal.loaded, self._kept(), teachers, whole=Policy(rehearsal.net).whole, worn=worn
        )

    def _kept(self) -> Mapping[str, bool]:
        """Weight sets beside the current one and the teachers, and whether they follow it."""
        if self.stage.stage == "supervised":
            return {"ema": True} if self.stage.ema else {}
        following = {SET_OF[role] for role in FOLLOWING}
        return {name: name in following for name in sorted(sets_for(self._objective()))}

    def _frozen(self) -> list[Part]:
        """Encoders and autoencoder."""
        trained = self.stage.stage == "supervised"
        return [
            Part(name=FROZEN.get(name, name.replace("_", " ")), size=size, where=USED,
                 phases=("encode", "decode") if name == "vae" else ("encode",))
            for name, size in self.rehearsal.footprint.frozen.items()
        ] + ([Part(name="encoding of the pictures", size=None if self.rehearsal.footprint.frozen else 0, where=USED,
                   phases=("encode",))] if trained else [])  # fmt: skip

    def _samples(self) -> list[Part]:
        """A rollout, its pictures, and what is kept of it."""
        stage = self.stage
        guided, batch = self._guided(self._role), stage.sampling.batch
        drawn = [(self._role, chunk(self.prompts, self.group, batch, guided=guided))]
        if stage.stage in ("rl", "distill"):
            drawn.append((self._role, chunk(PROMPTS, SEEDS, batch, guided=guided)))
        if self._probed:
            role = Role.TEACHER if stage.stage == "distill" else Role.ROLLOUT
            drawn.append((role, chunk(self._probed, 1, batch, guided=self._guided(role))))
        pictures = max(each.points for _, each in drawn)
        forward = max(self._rollout(role, each) for role, each in drawn)
        size = FP32 * self.prompts * self.group * torch.Size(self.rehearsal.shape).numel()
        states = stage.sampling.steps + 1 if self._keeps_states() else 1
        dtype = dtype_of(self.place.recipe.engine.precision)
        own = f"{self.adapter.name} {self.adapter.options.model_dump_json()} {self.adapter.layout(self.prompt)}"
        key = f"decode {own} {pictures} {dtype}"
        decoding = self.place.once(key, lambda: self.rehearsal.decode(pictures, dtype))
        return [
            Part(name="forwards of a rollout", size=forward, where=USED, phases=("rollout",)),
            Part(name="decoding", size=decoding, where=USED, phases=("decode",)),
            Part(name="latents of a round", size=size * states),
            Part(name="states that progress is measured on", size=self._probe_states()),
        ]

    @property
    def _probed(self) -> int:
        """Prompts whose states measure progress, for each model that answers for them."""
        return getattr(self.stage, "probe_prompts", 0)

    def _probe_states(self) -> int:
        """States of the first process, and as many velocities."""
        models = len(self.stage.weight_sets) if self.stage.stage == "distill" else 1
        states = self._probed and models * self._probed * len(looked_at(self.stage.sampling.steps))
        return 2 * FP32 * states * torch.Size(self.rehearsal.shape).numel()

    def _keeps_states(self) -> bool:
        return self.stage.stage == "distill" or (
            self.stage.stage == "rl" and self._objective().requires.points == "trajectory"
        )

    def _rollout(self, role: Role, drawn: Any) -> int:
        batch = Batch(points=drawn.points, prompts=drawn.prompts, limit=self.stage.sampling.batch)
        key = f"rollout {id(self.rehearsal)} {batch} {_named(self.guidance)} {role}"
        size: int = self.place.once(key, lambda: self.rehearsal.rollout(batch, self.guidance, role))
        return size

    def _objective(self) -> PolicyObjective[Any]:
        return objective_of(self.stage, lambda kind, ref, _: place_build(self.place, kind, ref))

    def _update(self) -> int:
        objective, batch = self._objective(), self._micro_batch()
        key = f"update {id(self.rehearsal)} {batch} {_named(self.guidance)} {_named(objective)}"
        size: int = self.place.once(key, lambda: self.rehearsal.update(batch, self.guidance, objective))
        return size

    def _others(self) -> int:
        """Of the roles without gradient, the one whose forwards need most; those of the probe are among them."""
        batch, sizes = self._micro_batch(), [0]
        asked = [(role, batch) for role in self._objective().roles() - {Role.CURRENT}]
        if self._probed:
            answers = Role.TEACHER if self.stage.stage == "distill" else Role.CURRENT
            asked.append((answers, self._probe_batch()))
        for role, points in asked:
            key = f"role {id(self.rehearsal)} {points} {_named(self.guidance)} {role}"
            sizes.append(self.place.once(key, partial(self.rehearsal.rollout, points, self.guidance, role)))
        return max(sizes)

    def _probe_batch(self) -> Batch:
        """States of the probe that go through the network together."""
        sampling = self.stage.sampling
        samples, states = together(sampling.batch, sampling.steps)
        samples = min(samples, self._probed)
        return Batch(points=samples * states, prompts=samples, limit=2 * samples * states)

    def _micro_batch(self) -> Batch:
        stage = self.stage
        if stage.stage == "supervised":
            return Batch(points=stage.batch * stage.points, prompts=stage.batch, limit=2 * stage.batch * stage.points)
        timesteps: TimestepSampler[Any] = place_build(self.place, "timesteps", stage.timesteps)
        points = len(timesteps.plan(self.adapter.times(stage.sampling.steps, self.prompt), generator(0)).train)
        most = micro_batch(self.prompt, self.prompts, self.group, points, stage.micro_batch)
        return Batch(points=most.points, prompts=most.prompts, limit=2 * most.points)

    def _told(self) -> int:
        routes = self.routes if self.stage.stage == "distill" else 1
        guided = any(self._guided(role) for role in Role)
        prompts = self.prompts + self._probed
        key = f"told {id(self.rehearsal)} {prompts} {guided}"
        size: int = self.place.once(key, lambda: self.rehearsal.told(prompts, guided=guided))
        return size * routes


def place_build(place: Placement, kind: str, ref: Any) -> Any:
    """A component of the recipe."""
    from velatura.core.recipe import Ref

    return build(place.registry, kind, Ref.model_validate({"use": ref}) if isinstance(ref, str) else ref)


def _named(component: Any) -> str:
    return f"{component.name} {component.options.model_dump_json()}"


def advice(plan: MemoryPlan, there: int, stage: Any, sharding: Sharding) -> str:
    """What to change where one GPU has only `there` bytes."""
    ways = []
    options = stage.adapter.with_
    if plan.phase == "update":
        if not options.get("gradient_checkpointing", False):
            ways.append("set the adapter's gradient_checkpointing: true")
        ways.append("take a smaller micro_batch or fewer trained timesteps")
    if plan.phase in ("rollout", "decode"):
        ways.append("take a smaller sampling.batch or group_size")
    if plan.phase in ("update", "step") and sharding.zero_stage < 2:
        ways.append("set engine.kind deepspeed with zero_stage: 2 and spread it over more GPUs")
    if options.get("lora_rank", 32) is None:
        ways.append("train LoRA weights (lora_rank) in place of all")
    ways.append("set engine.precision bf16" if sharding.precision == "fp32" else "draw smaller pictures")
    return (
        f"needs {readable(plan.peak)} on one GPU ({plan.phase}), which has {readable(there)}. "
        f"{'; or '.join(ways)[0].upper()}{'; or '.join(ways)[1:]}."
    )


def readable(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


__all__ = ["CPU", "Placement", "advice", "readable"]
