"""A step of reinforcement learning and one of distillation on a network of the proportions of Qwen-Image 2.1.

Random weights as large as the device takes, through the framework's own stages: adapter, rollout, judge, learner,
engine. What is left out is named: prompts are random rows instead of a text encoder's, and pictures are the first
channels of the latents instead of an autoencoder's. Reports seconds by phase, peak memory, the share of the device's
arithmetic that the update uses, and what the shared prefix of a prompt saved.

    python benchmarks/large_model.py --tiny                  # under a minute on one core
    python benchmarks/large_model.py --sources 1             # edits, as many layers as fit, 512 and 1024 pixels
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from random_model import SEEN, Random, Unshared, model_folder, parameters
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from velatura.api import (
    NoOptions,
    Observer,
    RewardModel,
    Role,
    Sample,
    Scores,
    StepEnd,
    hookimpl,
)
from velatura.core.engine.local import choose_device
from velatura.core.learner import Learner
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry
from velatura.core.stages import distill, rl
from velatura.core.stages.common import StageRun
from velatura.core.stages.showcase import Showcase
from velatura.plugins.adapters.lora import unwrap

PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 multiplications and additions a second, by a part of the device's name, as the makers state them."""
WARM, COUNTED, MEASURED = 0, 1, 2
"""Steps of a stage: the first checks itself, the second counts FLOPs, the third is timed."""
SHARE = 0.6
"""Of the free memory of a device that weights may take."""


@dataclass(slots=True)
class Watch:
    """What the network and the learner did, while anybody asks."""

    flops: int = 0
    """Of an update, without what gradient checkpointing computes again."""
    counting: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    peak: int = 0


WATCH = Watch()


class Grain(RewardModel[NoOptions]):
    """Costs nothing and is never constant, so that every group is learned from."""

    name = "grain"

    def score(self, samples: Sequence[Sample]) -> Scores:
        return Scores.of(torch.stack([sample.image.mean() for sample in samples]))


class Watcher(Observer[NoOptions]):
    """Takes the measurements of the last step."""

    name = "watcher"

    def step_end(self, event: StepEnd) -> None:
        WATCH.counting = event.step + 1 == COUNTED
        if event.step == MEASURED:
            WATCH.metrics = dict(event.metrics)
            WATCH.peak = peak_memory()
        else:
            SEEN.tokens = 0
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()


class Plugin:
    """The parts above, as a plugin called `bench`."""

    @staticmethod
    @hookimpl
    def velatura_adapter() -> list[type[Any]]:
        return [Random, Unshared]

    @staticmethod
    @hookimpl
    def velatura_reward() -> list[type[Any]]:
        return [Grain]

    @staticmethod
    @hookimpl
    def velatura_observer() -> list[type[Any]]:
        return [Watcher]


def peak_memory() -> int:
    """Bytes: allocated on the GPU in the step, else resident in this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def watched() -> Iterator[None]:
    """Count the FLOPs of updates when asked; draw no pictures for people."""
    learn, draw, velocity = Learner.learn, Showcase.draw, Learner._velocity
    again: list[int] = []

    def current(learner: Learner, net: nn.Module, batch: Any, cond: Any, role: Role) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = velocity(learner, net, batch, cond, role)
        if role is Role.CURRENT and unwrap(learner.policy.net).is_gradient_checkpointing:
            again.append(counter.get_total_flops())
        return result

    def counted(learner: Learner, batches: Any) -> Any:
        if not WATCH.counting:
            return learn(learner, batches)
        # The counter does not know the CPU's fused attention; its plain one consists of products that it does know.
        plain = sdpa_kernel(SDPBackend.MATH) if learner.engine.device.type == "cpu" else nullcontext()
        again.clear()
        Learner._velocity = current  # type: ignore[method-assign]
        with FlopCounterMode(display=False) as counter, plain:
            tally = learn(learner, batches)
        Learner._velocity = velocity  # type: ignore[method-assign]
        WATCH.flops = counter.get_total_flops() - sum(again)
        return tally

    Learner.learn, Showcase.draw = counted, lambda *_: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Learner.learn, Showcase.draw, Learner._velocity = learn, draw, velocity  # type: ignore[method-assign]


def recipe_of(given: argparse.Namespace, adapter: str, side: int, folder: Path) -> Path:
    """Reinforcement learning and a distillation of its result."""
    edits = given.sources > 0
    line = {"prompt": "a picture", "sources": ["source.png"] * given.sources}
    Image.new("RGB", (side, side), (90, 120, 200)).save(folder / "source.png")
    (folder / "prompts.jsonl").write_text(
        "\n".join(json.dumps({**line, "id": str(i), "prompt": f"picture {i}"}) for i in range(given.prompts))
    )
    files = {"file": "prompts.jsonl", "eval_file": "prompts.jsonl", "task": "edit" if edits else "t2i"}
    route = files["task"]
    stage = {
        "steps": MEASURED + 1, "prompts_per_step": given.prompts, "micro_batch": given.micro_batch,
        "checkpoint_every": 1000, "pictures_every": 1000, "observers": [{"use": "bench/watcher"}],
        "timesteps": {"use": "high-noise", "with": {"count": given.timesteps}},
    }  # fmt: skip
    options = {"path": "model", "height": side, "width": side, "lora_rank": given.rank, "cache": False,
               "gradient_checkpointing": given.checkpointing}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "engine": {"kind": given.engine, "precision": given.precision, "device": given.device},
        "adapter": {"use": f"bench/{adapter}", "with": options},
        "sampling": {"steps": given.solver_steps, "batch": given.batch},
        "stages": {
            "rl": {**stage, "stage": "rl", "task": {"use": "prompts", "with": files}, "group_size": given.group,
                   "probe_prompts": 0,
                   "guidance": {"use": "rollout-only", "with": {"scale": 4.0}}, "rewards": [{"use": "bench/grain"}]},
            "distill": {**stage, "stage": "distill", "teachers": {route: "rl"}, "probe_prompts": 1,
                        "guidance": {"use": "teacher-only", "with": {"scale": 4.0}}, "probe_every": 1000},
        },
    }))  # fmt: skip
    return path


def stage_of(path: Path, name: str, device: torch.device) -> StageRun:
    """A stage of the recipe, ready to run."""
    recipe, registry = load_recipe(path), Registry.discover()
    registry.add(Plugin, "bench")
    config: Any = recipe.stage(name)
    stage = StageRun(
        name=name, config=config, recipe=recipe, registry=registry, folder=path.parent / "run" / name,
        run_folder=path.parent / "run", seed=0, device=device, base=path.parent,
    )  # fmt: skip
    stage.observers += [stage.build("observer", ref, "observers") for ref in config.observers]
    return stage


def refuse_difference(shared: Path, apart: Path, device: torch.device) -> None:
    """Nothing is timed unless both ways give the same velocities, but for rounding."""
    stage = stage_of(shared, "rl", device)
    ways: list[Any] = [stage.adapter(), stage_of(apart, "rl", device).adapter()]
    net, prompts = ways[0].load(device), [stage.task_of("rl").prompts("train")[0]]
    x = ways[0].noise(prompts * 2, [0, 1]).to(device)
    t, rows = torch.tensor([0.9, 0.3], device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with torch.no_grad():
        a, b = (way.velocity(net, x, t, way.encode(prompts).to(device), rows) for way in ways)
    allowed = {torch.float32: 2e-4, torch.bfloat16: 5e-2}[ways[0].dtype] * float(b.abs().max())
    if not float((a - b).abs().max()) <= allowed or float(b.std()) == 0:
        raise SystemExit(f"the two ways differ by {float((a - b).abs().max()):.1e}; nothing was timed")


def run_stages(path: Path, names: Sequence[str], device: torch.device) -> dict[str, dict[str, float]]:
    """What was measured of each stage; one network at a time is in memory."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        free()
        stage = stage_of(path, name, device)
        stage.folder.mkdir(parents=True)
        (rl if name == "rl" else distill).run(stage)
        found[name] = {
            **{phase: WATCH.metrics.get(f"time/{phase}_s", 0.0) for phase in ("rollout", "judge", "update")},
            "rows": sum(value for key, value in WATCH.metrics.items() if key.startswith("rows/")),
            "tokens": SEEN.tokens, "update_flops": WATCH.flops, "peak_bytes": WATCH.peak,
        }  # fmt: skip
    return found


def free() -> None:
    """Give back what the stage before held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def most_flops(given: argparse.Namespace, device: torch.device) -> tuple[float, str]:
    """FLOP/s that the device can do, and where the number is from."""
    if given.peak is not None:
        return given.peak, "given"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for part, peak in PEAKS.items():
        if part in name and given.precision == "bf16":
            return peak, name
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = min(_timed(lambda: a @ a) for _ in range(5))
    return 2 * side**3 / seconds, f"a product of {side} x {side} matrices on {name}"


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def config_of(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The network: as many layers as fit on a GPU, unless told otherwise."""
    axes = {128: (16, 56, 56), 16: (4, 6, 6)}[given.head_dim]
    config = {
        "in_channels": 64, "out_channels": 64, "num_attention_heads": given.heads, "num_layers": given.layers,
        "attention_head_dim": given.head_dim, "context_in_dim": given.context, "axes_dims_rope": axes,
    }  # fmt: skip
    if given.layers is None:
        width = 4 if given.precision == "fp32" else 2
        one, two = (width * parameters({**config, "num_layers": count}) for count in (1, 2))
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 16e9
        config["num_layers"] = max(1, min(32, int((SHARE * free - one) // (two - one)) + 1))
    return config


def show(side: int, kind: str, found: Mapping[str, float], peak: float) -> None:
    """One line of results."""
    seconds = ", ".join(f"{phase} {found[phase]:.2f}" for phase in ("rollout", "judge", "update"))
    utilised = found["update_flops"] / found["update"] / peak
    print(
        f"{side:5} {kind:12} s: {seconds}   {found['rows']:,.0f} rows, {found['tokens']:,} tokens   update "
        f"{found['update_flops'] / 1e12:.3g} TFLOP, MFU {utilised:.1%}   memory {found['peak_bytes'] / 1e9:.2f} GB",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two layers, pictures of 64 and 128 pixels")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides of pictures in pixels")
    parser.add_argument("--layers", type=int, help="default: as many as fit, at most the 32 of the published network")
    counts = {"heads": 32, "head-dim": 128, "context": 4096, "sources": 0, "prompts": 2, "group": 8, "solver-steps": 10,
              "timesteps": 2, "micro-batch": 4, "batch": 16, "rank": 32}  # fmt: skip
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--engine", choices=["local", "deepspeed"], default="local")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak", type=float, help="FLOP/s of the device; default: looked up, or a matrix product's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    if "--tiny" in sys.argv:
        parser.set_defaults(sizes=[64, 128], layers=2, heads=2, head_dim=16, context=16, group=2, solver_steps=2,
                            rank=2, precision="fp32")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    given = arguments()
    device = choose_device(given.device)
    config, results = config_of(given, device), []
    peak, source = most_flops(given, device)
    checkpointing = "on" if given.checkpointing else "off"
    print(f"{parameters(config):,} parameters in {config['num_layers']} layers, {given.precision}, gradient "
          f"checkpointing {checkpointing}; peak {peak:.3g} FLOP/s ({source})", flush=True)  # fmt: skip
    for side in given.sizes:
        with ExitStack() as stack:
            stack.enter_context(watched())
            shared, apart = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
            for folder in (shared, apart):
                model_folder(folder / "model", config)
            recipes = recipe_of(given, "random", side, shared), recipe_of(given, "unshared", side, apart)
            refuse_difference(*recipes, device)
            found = run_stages(recipes[0], ["rl", "distill"], device)
            found["rl unshared"] = run_stages(recipes[1], ["rl"], device)["rl"]
        for kind, measured in found.items():
            show(side, kind, measured, peak)
        with_prefix, without = found["rl"], found["rl unshared"]
        saved = [sum(each[phase] for phase in ("rollout", "update")) for each in (without, with_prefix)]
        print(f"{side:5} the shared prefix: {without['tokens']:,} -> {with_prefix['tokens']:,} tokens, "
              f"{saved[0]:.2f} -> {saved[1]:.2f} s ({saved[0] / saved[1]:.2f} x)")  # fmt: skip
        results.append({"side": side, "peak_flops_per_s": peak, "sources": given.sources, "config": config, **found})
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
