"""What the framework costs: wall time of one step of reinforcement learning over that of bare torch doing the same.

The floor is written in one go in floor.py, without any class of the framework but the network and the functions of its
adapter: the same transformer rows in the same batch shapes, the same decodes, as many AdamW steps. It scores nothing;
its advantages are random. Both run in turn in one process, so that a busy machine slows both alike; the network's
calls of one step are counted on both sides and have to agree.

    python benchmarks/rl_step.py                     # both engines, shipped rewards
    python benchmarks/rl_step.py --json result.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from diffusers import QwenImage21Transformer2DModel
from floor import BETA, KL, LR, SCALE, Floor, Size
from safetensors.torch import load_file, save_file
from torch import nn

from velatura.api import (
    NoOptions,
    Observer,
    RewardModel,
    Sample,
    Scores,
    StepEnd,
    hookimpl,
)
from velatura.core.build import build
from velatura.core.recipe import Ref, load_recipe
from velatura.core.registry import Registry
from velatura.core.stages import rl
from velatura.core.stages.common import StageRun

WARM_UP = 3
"""Steps that are not measured: the first checks itself, in the first two old and current policy are equal for a while
and share a forward, and in the third the calls of the network are counted."""
SHIPPED = {
    "t2i": [
        {"use": "tinyworld-alignment", "weight": 1.0},
        {"use": "tinyworld-aesthetics", "weight": 0.5},
        {"use": "tinyworld-portrait", "weight": 0.0, "weight_by_category": {"portrait": 0.5}},
    ],
    "edit": [
        {"use": "tinyworld-instruction", "weight": 1.0},
        {"use": "tinyworld-preservation", "weight": 0.5},
        {"use": "tinyworld-identity", "weight": 0.0, "weight_by_category": {"expression": 0.5, "hair": 0.5}},
    ],
}
"""The rewards of recipes/tinyworld.yaml."""


class Grain(RewardModel[NoOptions]):
    """Costs nothing and is never constant, so that every group has a signal and every row is trained on."""

    name = "grain"

    def score(self, samples: Sequence[Sample]) -> Scores:
        return Scores.of(torch.stack([sample.image.mean() for sample in samples]))


class Plugin:
    """The reward above, as a plugin called `bench`."""

    @staticmethod
    @hookimpl
    def velatura_reward() -> list[type[Grain]]:
        return [Grain]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A moment, on the wall and in CPU seconds of this process."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def since(self) -> tuple[float, float]:
        """Seconds from then to now."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


@dataclass(slots=True)
class Calls:
    """Which calls the network got: shape, mode and whether with gradient, and how often."""

    seen: Counter[tuple[Any, ...]] = field(default_factory=Counter)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count while inside."""
        original, seen = QwenImage21Transformer2DModel.forward, self.seen

        def forward(net: nn.Module, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
            text = named["encoder_hidden_states"]
            seen[tuple(hidden_states.shape), text.shape[1], named["kv_cache_mode"], torch.is_grad_enabled()] += 1
            return original(net, hidden_states, *rest, **named)

        QwenImage21Transformer2DModel.forward = forward
        try:
            yield
        finally:
            QwenImage21Transformer2DModel.forward = original


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One step of the framework and one of the floor, done one after the other."""

    wall: float
    cpu: float
    floor_wall: float
    floor_cpu: float
    judge: float
    """Seconds of the framework's step in which only scores were awaited."""


class InTurn(Observer[NoOptions]):
    """Runs the floor after every step of the framework; its own time is nobody's."""

    name = "in-turn"

    def __init__(self, floor: Floor) -> None:
        super().__init__()
        self.floor = floor
        self.pairs: list[Pair] = []
        self.phases: list[dict[str, float]] = []
        self.framework_calls, self.floor_calls = Calls(), Calls()
        self._mark = Clock()
        self._counting = ExitStack()

    def step_end(self, event: StepEnd) -> None:
        wall, cpu = self._mark.since()
        self._counting.close()
        began = Clock()
        with self.floor_calls.counted() if event.step == WARM_UP - 1 else nullcontext():
            self.floor.step()
        floor_wall, floor_cpu = began.since()
        if event.step >= WARM_UP and len(self.pairs) < self.floor.size.repeats:
            judge = event.metrics["time/judge_s"]
            self.pairs.append(Pair(wall=wall, cpu=cpu, floor_wall=floor_wall, floor_cpu=floor_cpu, judge=judge))
            self.phases.append({k: v for k, v in event.metrics.items() if k.startswith("time/")})
        if event.step == WARM_UP - 2:
            self._counting.enter_context(self.framework_calls.counted())
        self._mark = Clock()


def recipe_of(size: Size, engine: str, rewards: str, weights: Path) -> dict[str, Any]:
    """The recipe of a text-to-image or edit teacher of the demo, without curation."""
    kind = {"kind": "local"} if engine == "local" else {"kind": "deepspeed", "zero_stage": 1}
    return {
        "engine": {**kind, "threads": 1},
        "adapter": {"use": "tinyworld", "with": {"weights": str(weights)}},
        "sampling": {"steps": size.solver_steps, "batch": size.batch},
        "stages": {
            "teacher": {
                "stage": "rl",
                "task": {"use": "tinyworld", "with": {"task": size.task, "count": 8 * size.prompts}},
                "guidance": {"use": "rollout-only", "with": {"scale": SCALE}},
                "timesteps": {"use": "high-noise", "with": {"count": size.timesteps}},
                "objective": {"use": "nft", "with": {"kl": KL, "beta": BETA}},
                "rewards": [*(SHIPPED[size.task] if rewards == "shipped" else []), {"use": "bench/grain"}],
                "observers": [{"use": "tensorboard"}],
                "steps": WARM_UP + size.repeats + 1,  # the last one draws pictures and saves
                "prompts_per_step": size.prompts,
                "group_size": size.group,
                "updates_per_step": size.updates,
                "checkpoint_every": 1000,
                "optimizer": {"lr": LR},
            }
        },
    }


def measure(size: Size, engine: str, rewards: str, weights: Path, folder: Path) -> InTurn:
    """Train with the framework's own stage, the floor in turn.

    Raises:
        SystemExit: the two did not do the same work.
    """
    path = folder / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(size, engine, rewards, weights)))
    recipe, registry = load_recipe(path), Registry.discover()
    registry.add(Plugin, "bench")
    config: Any = recipe.stage("teacher")
    stage = StageRun(
        name="teacher", config=config, recipe=recipe, registry=registry,
        folder=folder / engine / "teacher", run_folder=folder / engine, seed=0, device=torch.device("cpu"), base=folder,
    )  # fmt: skip
    stage.folder.mkdir(parents=True)
    adapter = stage.adapter()
    in_turn = InTurn(Floor(adapter, stage.task_of("teacher").prompts("train"), size))
    stage.observers += [stage.build("observer", ref, "observers") for ref in config.observers]
    stage.observers.append(in_turn)
    rl.run(stage)
    ours, floor = in_turn.framework_calls.seen, in_turn.floor_calls.seen
    if ours != floor:
        raise SystemExit(f"not the same work:\n  only the framework: {ours - floor}\n  only the floor: {floor - ours}")
    return in_turn


def fresh_weights(folder: Path) -> Path:
    """A network of the shipped size in which every block does something."""
    fresh = Ref.model_validate({"use": "tinyworld", "with": {"weights": None}})
    adapter: Any = build(Registry.discover(), "adapter", fresh)
    generator = torch.Generator().manual_seed(0)
    state = adapter.load(torch.device("cpu")).state_dict()
    noisy = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    path = folder / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in noisy.items()}, path)
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(engine: str, rewards: str, in_turn: InTurn) -> dict[str, Any]:
    """Ratios pair by pair, so that what slows the machine for a while cancels."""
    pairs = in_turn.pairs
    return {
        "engine": engine,
        "rewards": rewards,
        "wall_ratio": spread([p.wall / p.floor_wall for p in pairs]),
        "cpu_ratio": spread([p.cpu / p.floor_cpu for p in pairs]),
        "wall_ratio_without_waiting_for_scores": spread([(p.wall - p.judge) / p.floor_wall for p in pairs]),
        "wall_ratio_of_fastest": min(p.wall for p in pairs) / min(p.floor_wall for p in pairs),
        "cpu_ratio_of_fastest": min(p.cpu for p in pairs) / min(p.floor_cpu for p in pairs),
        "framework_wall_s": spread([p.wall for p in pairs]),
        "floor_wall_s": spread([p.floor_wall for p in pairs]),
        "phases_s": {name: statistics.median(p[name] for p in in_turn.phases) for name in in_turn.phases[0]},
        "network_calls": sum(in_turn.framework_calls.seen.values()),
        "floor_network_calls": sum(in_turn.floor_calls.seen.values()),
        "network_rows": sum(key[0][0] * count for key, count in in_turn.floor_calls.seen.items()),
    }


def show(result: dict[str, Any]) -> None:
    """One engine's result."""

    def line(key: str) -> str:
        return "{median:.3f} ({low:.3f} to {high:.3f})".format(**result[key])

    phases = ", ".join(f"{name[5:-2]} {seconds:.2f}" for name, seconds in result["phases_s"].items())
    print(
        f"{result['engine']}, {result['rewards']} rewards: {line('wall_ratio')} x floor, wall; {line('cpu_ratio')} CPU"
    )
    fastest = (f"{result[f'{clock}_ratio_of_fastest']:.3f} {clock}" for clock in ("wall", "cpu"))
    print(f"  fastest step over fastest floor: {', '.join(fastest)}")
    print(f"  without waiting for scores {line('wall_ratio_without_waiting_for_scores')}; "
          f"framework {line('framework_wall_s')} s, floor {line('floor_wall_s')} s")  # fmt: skip
    print(f"  phases, s: {phases}; {result['network_calls']} network calls, {result['network_rows']} rows a step")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=["local", "deepspeed", "both"], default="both")
    parser.add_argument("--rewards", choices=["shipped", "free"], default="shipped", help="free: of no cost")
    parser.add_argument("--task", choices=["t2i", "edit"], default="t2i")
    counts = {"repeats": 5, "prompts": 16, "group": 16, "solver-steps": 8, "timesteps": 2, "updates": 4}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=256, help="most rows in one forward of a rollout")
    parser.add_argument("--weights", type=Path, help="a checkpoint of the embedded world; fresh and noisy by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    size = Size(
        task=given.task, prompts=given.prompts, group=given.group, solver_steps=given.solver_steps,
        timesteps=given.timesteps, updates=given.updates, batch=given.batch, repeats=given.repeats,
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    with tempfile.TemporaryDirectory() as name:
        weights = given.weights.resolve() if given.weights else fresh_weights(Path(name))
        load_file(weights)
        for engine in ("local", "deepspeed") if given.engine == "both" else (given.engine,):
            in_turn = measure(size, engine, given.rewards, weights, Path(name))
            results.append(summarise(engine, given.rewards, in_turn))
            show(results[-1])
    if given.json:
        about = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        settings = {name: getattr(size, name) for name in Size.__slots__}
        given.json.write_text(json.dumps({"settings": settings, "about": about, "results": results}, indent=2))


if __name__ == "__main__":
    main()
