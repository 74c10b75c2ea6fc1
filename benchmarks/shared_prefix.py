"""What the shared prefix of Qwen-Image 2.1 saves: rows, CPU seconds and memory against the stock forward.

A random network with the proportions of the large one: for edits, the source image makes half of the sequence. The
stock path gives every sample (or point) its whole sequence; the shared path computes the prompt's prefix once, for all
samples and steps of a rollout, and with gradient for all points of an update. Both must agree before they are timed.

    python benchmarks/shared_prefix.py                        # a minute on one core
    python benchmarks/shared_prefix.py --width 1024 --layers 16 --side 64 --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from diffusers import QwenImage21Transformer2DModel
from torch import Tensor

from velatura.plugins.adapters.qwen_image_21_network import (
    Grid,
    Layout,
    QwenImage21Conditioning,
    prepare,
    velocity,
)

CHANNELS, CONTEXT, WORDS = 64, 128, 32
AGREE = 2e-4
"""Largest difference of velocities and relative difference of gradients that fp32 sums in another order explain."""


def network(width: int, layers: int, device: str) -> QwenImage21Transformer2DModel:
    """Random weights, 64 channels a head."""
    torch.manual_seed(0)
    return QwenImage21Transformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=layers, num_attention_heads=width // 64,
        attention_head_dim=64, context_in_dim=CONTEXT, axes_dims_rope=(16, 24, 24),
    ).to(device)  # fmt: skip


def conditioning(side: int, edits: bool, device: str) -> QwenImage21Conditioning:
    """One prompt, with a source image as large as the target for an edit."""
    draw = torch.Generator().manual_seed(1)
    grid = Grid(1, side, side)
    slots = (True,) * (grid.tokens // 4 if edits else 0) + (False,) * WORDS
    text = torch.randn(1, len(slots), CONTEXT, generator=draw)
    sources = torch.randn(1, grid.tokens, CHANNELS, generator=draw) if edits else None
    layout = Layout(slots=slots, sources=(grid,) if edits else (), target=grid)
    return QwenImage21Conditioning.of(text, layout, sources=sources).to(torch.device(device))


def stock(net: QwenImage21Transformer2DModel, x: Tensor, t: Tensor, cond: QwenImage21Conditioning) -> Tensor:
    """The whole sequence of every point through the class's own forward."""
    count, target = len(x), cond.layout.target
    tokens = x if cond.sources is None else torch.cat([cond.sources.expand(count, -1, -1), x], dim=1)
    slots = torch.tensor([[*cond.layout.slots, *[True] * (target.tokens // 4)]], device=x.device).expand(count, -1)
    images = [[*cond.layout.sources, target]] * count
    out: Tensor = net(tokens, cond.text.expand(count, -1, -1), t, images, slots, return_dict=False)[0]
    return out[:, -target.tokens :]


def rollouts(
    net: QwenImage21Transformer2DModel, cond: QwenImage21Conditioning, group: int, steps: int
) -> dict[str, Callable[[], Tensor]]:
    """Euler steps of a group, both ways."""
    device = cond.text.device
    start = torch.randn(group, cond.layout.target.tokens, CHANNELS, generator=torch.Generator().manual_seed(2)).to(
        device
    )
    times, rows = torch.linspace(1, 0, steps + 1), torch.zeros(group, dtype=torch.int64, device=device)

    def run(v: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = start
        for k in range(steps):
            x = x + (times[k + 1] - times[k]) * v(x, times[k].expand(group).to(device))
        return x

    def unshared() -> Tensor:
        with torch.no_grad():
            return run(lambda x, t: stock(net, x, t, cond))

    def shared() -> Tensor:
        with torch.no_grad():
            prepared = prepare(net, cond)
            return run(lambda x, t: velocity(net, x, t, prepared, rows))

    return {"stock": unshared, "shared": shared}


def updates(
    net: QwenImage21Transformer2DModel, cond: QwenImage21Conditioning, points: int
) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of the points of one prompt, both ways; returns all gradients as one vector."""
    device, draw = cond.text.device, torch.Generator().manual_seed(3)
    x = torch.randn(points, cond.layout.target.tokens, CHANNELS, generator=draw).to(device)
    t = torch.rand(points, generator=draw).to(device)
    rows = torch.zeros(points, dtype=torch.int64, device=device)

    def learn(v: Callable[[], Tensor]) -> Tensor:
        net.zero_grad()
        torch.cos(v()).mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    return {
        "stock": lambda: learn(lambda: stock(net, x, t, cond)),
        "shared": lambda: learn(lambda: velocity(net, x, t, prepare(net, cond), rows)),
    }


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes that the forward keeps for the backward, each storage once; 0 where there is no backward."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(seen.values())


def seconds(calls: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each (wall seconds on a GPU), in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for _ in range(repeats):
        for name, call in calls.items():
            begin = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    """Measure rollouts and updates of text-to-image and of edits, and print what is saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--side", type=int, default=16, help="latent tokens along a side of the picture")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--points", type=int, default=16, help="points of a prompt in an update")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    net, found = network(options.width, options.layers, options.device), {}
    for kind in ("t2i", "edit"):
        cond = conditioning(options.side, kind == "edit", options.device)
        target, prefix = cond.layout.target.tokens, cond.layout.prefix_tokens
        jobs = {
            "rollout": (rollouts(net, cond, options.group, options.steps), options.group * options.steps),
            "update": (updates(net, cond, options.points), options.points),
        }
        for job, (calls, rows) in jobs.items():
            results = {name: call() for name, call in calls.items()}
            scale = results["stock"].abs().max() if job == "update" else 1.0
            difference = float((results["stock"] - results["shared"]).abs().max() / scale)
            if difference > AGREE:
                raise SystemExit(f"{kind} {job}: the two paths differ by {difference:.1e}; nothing was timed")
            taken = seconds(calls, options.repeats)
            tokens = {"stock": rows * (prefix + target), "shared": prefix + rows * target}
            kept = {name: kept_bytes(call) for name, call in calls.items()} if job == "update" else {}
            found[f"{kind} {job}"] = {"tokens": tokens, "seconds": taken, "kept_bytes": kept, "difference": difference}
            line = f"{kind:5} {job:8} tokens {tokens['stock']:>8,} -> {tokens['shared']:>8,}   "
            line += f"seconds {taken['stock']:.2f} -> {taken['shared']:.2f} ({taken['stock'] / taken['shared']:.2f} x)"
            if kept:
                line += f"   kept for the backward {kept['stock'] / 1e6:,.0f} -> {kept['shared'] / 1e6:,.0f} MB"
            print(line, flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
