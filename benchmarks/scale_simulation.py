"""How long a step of reinforcement learning on Qwen-Image 2.1 takes on 8, 64 and 512 GPUs, predicted.

Arithmetic from the network's configuration, messages from what the engine sends, speeds of GPUs and networks from the
assumptions below, and what Python does for every sample as measured on a CPU. The same formulas, with costs measured by
`--measure`, predict a run of two processes on this machine, which is then made.

    python benchmarks/scale_simulation.py              # the tables of docs/scaling.md and its picture
    python benchmarks/scale_simulation.py --measure    # two processes on this machine: predicted and measured
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "images" / "scaling.svg"
MEASURED = Path(__file__).with_name("scale_measured.json")
GPUS = (8, 64, 512)
STAGES = (1, 2, 3)
FP32, BF16 = 4, 2


def said(default: Any, text: str) -> Any:
    """A value and where it is from."""
    return field(default=default, metadata={"said": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Everything that is not known from the code. Rates are of one GPU."""

    peak: float = said(989e12, "FLOP/s in bf16 of an H100 or H200, as its maker states it")
    forward_share: float = said(0.40, "of that, what forwards without gradient reach")
    update_share: float = said(0.40, "and what forwards and backwards with checkpointing reach")
    node: int = said(8, "GPUs in a machine")
    inside: float = said(350e9, "bytes/s of a collective between GPUs of a machine (NVLink)")
    between: float = said(40e9, "bytes/s of a collective between machines (one 400 Gbit/s port for each GPU)")
    hop: float = said(20e-6, "seconds until a message has gone one hop; a collective takes log2 of the GPUs")
    bus: float = said(20e9, "bytes/s from the CPU's memory to the GPU, for weight sets that wait there")
    ethernet: float = said(1e9, "bytes/s between processes outside NCCL (gloo): scores, reasons, pictures")
    spread: float = said(0.01, "deviation of the time that equal work takes; all wait for the slowest")
    judged: float = said(0.5, "seconds in which a judge GPU gives the scores of all rewards for a picture")
    judges: float = said(0.5, "judge GPUs for each GPU that trains, on servers of their own; not counted as GPUs")
    picture: float = said(1.5e6, "bytes of a picture on its way to a judge")
    report: float = said(1e3, "bytes of a sample's scores and reasons, which every process gets")
    python: float = said(
        150e-6,
        "seconds that each process takes for a sample of the whole step, as on a busy CPU; a tenth on a quiet one",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Qwen-Image 2.1, by the defaults of its class."""

    layers: int = 32
    width: int = 4096
    ratio: int = 3
    """Of the gated feed-forward to the width: three matrices."""
    rank: int = 32
    """Of LoRA, on the four matrices of every attention."""
    target: int = 4096
    """Tokens of a picture of 1024 x 1024: 16 x 16 pixels each."""
    prefix: int = 128
    """Tokens of a prompt, computed once for all samples, and looked at by each."""

    @property
    def parameters(self) -> int:
        """Of all blocks, which is nearly all."""
        return self.layers * (4 + 3 * self.ratio) * self.width**2

    @property
    def low_rank(self) -> int:
        """Parameters of LoRA."""
        return self.layers * 4 * self.rank * 2 * self.width

    def row(self) -> float:
        """FLOP of a forward of one sample at one time: matrices, and attention to prefix and target."""
        attention = 4 * self.target * (self.target + self.prefix) * self.width * self.layers
        return 2.0 * self.parameters * self.target + attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A step, as recipes/qwen-image-21.yaml has it."""

    prompts: int
    """Of all GPUs together."""
    group: int = 16
    solver: int = 40
    branches: int = 2
    """Conditional and unconditional, in a guided rollout."""
    points: int = 6
    """Trained timesteps of a sample, which is a micro-batch (`micro_batch: 8`)."""
    frozen: int = 2
    """Roles without gradient in an update: old and reference."""
    updates: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds of a step by phase."""

    rollout: float
    update: float
    waits: float
    """For others, in arithmetic: all wait for the slowest."""
    exchange: float
    """Gradients and weights between GPUs."""
    judges: float
    """What is waited for them when the pictures are drawn."""
    report: float
    """Scores of all processes to all, and what Python does with them."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))


def collective(size: float, gpus: int, given: Assumptions) -> float:
    """Seconds in which `size` bytes are gathered or scattered by all of a ring; a sum of all is two of them."""
    if gpus == 1:
        return 0.0
    rate = given.inside if gpus <= given.node else given.between
    return size * (gpus - 1) / gpus / rate + given.hop * math.log2(gpus)


def exchange(net: Network, load: Load, full: bool, stage: int, gpus: int, given: Assumptions) -> float:
    """Seconds of all collectives of a step. Gradients travel in fp32, at stage 1 once for an update and from stage 2 on
    after every micro-batch; new weights in bf16. Stage 3 gathers all weights once for a rollout and once for the roles
    without gradient of an update, block by block for every forward of a micro-batch, and twice for its backward, which
    computes the forward again."""
    trained = net.parameters if full else net.low_rank
    micro = load.prompts * load.group / gpus / load.updates
    gradients = collective(FP32 * trained, gpus, given) * load.updates * (1 if stage == 1 else micro)
    if stage < 3:
        return gradients + load.updates * collective(BF16 * trained, gpus, given)
    gathers = 1 + load.updates * (1 + 3 * micro)
    return gradients + gathers * collective(BF16 * net.parameters, gpus, given)


def predict(net: Network, load: Load, full: bool, stage: int, gpus: int, given: Assumptions) -> Step:
    """A step on `gpus` GPUs."""
    samples = load.prompts * load.group
    own, row = samples / gpus, net.row()
    rollout = own * load.solver * load.branches * row / (given.peak * given.forward_share)
    again = 4 if full else 3  # forward, forward again, and the backward through activations, and through weights
    update = own * load.points * row * (
        load.frozen / given.forward_share + again / given.update_share) / given.peak  # fmt: skip
    if full:  # sets wait on the CPU: worn by the rollout and by each role without gradient
        update += (1 + load.frozen * load.updates) * BF16 * net.parameters / given.bus
    waits = (rollout + update) * given.spread * math.sqrt(2 * math.log(gpus)) if gpus > 1 else 0.0
    judging = samples * given.judged / max(1.0, given.judges * gpus) + own * given.picture / given.ethernet
    batches = max(1.0, load.prompts / gpus)
    late = max(judging / batches, judging - rollout * (1 - 1 / batches))
    told = samples * (given.report / given.ethernet + given.python) if gpus > 1 else 0.0
    return Step(rollout=rollout, update=update, waits=waits, judges=late, report=told,
                exchange=exchange(net, load, full, stage, gpus, given))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the tables."""

    full: bool
    stage: int
    gpus: int
    grows: Step
    """Four prompts for each GPU."""
    fixed: Step
    """512 prompts, whatever the number of GPUs."""
    grows_share: float
    """Efficiency: seconds of one GPU by itself, by those of this many, on as much work each."""
    fixed_share: float


def _at(net: Network, given: Assumptions, full: bool, stage: int, prompts: int, gpus: int) -> Step:
    return predict(net, Load(prompts=prompts), full, stage, gpus, given)


def rows(given: Assumptions, net: Network | None = None) -> list[Row]:
    """All of them."""
    net, found = net or Network(), []
    for full in (False, True):
        for stage in STAGES:
            for gpus in GPUS:
                at = partial(_at, net, given, full, stage)
                grows, fixed = at(4 * gpus, gpus), at(512, gpus)
                found.append(Row(
                    full=full, stage=stage, gpus=gpus, grows=grows, fixed=fixed,
                    grows_share=at(4, 1).seconds / grows.seconds, fixed_share=at(512, 1).seconds / gpus / fixed.seconds,
                ))  # fmt: skip
    return found


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    head = ["trained", "ZeRO", "GPUs", "rollout", "update", "exchange", "judges", "others", "step", "efficiency",
            "step, 512 prompts", "efficiency"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in found:
        step = row.grows
        cells = ["all weights" if row.full else "LoRA 32", row.stage, row.gpus]
        times = [step.rollout, step.update, step.exchange, step.judges, step.waits + step.report, step.seconds]
        cells += [f"{seconds:.1f} s" for seconds in times] + [f"{row.grows_share:.0%}"]
        cells += [f"{row.fixed.seconds:.1f} s", f"{row.fixed_share:.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def assumptions(given: Assumptions) -> str:
    """Markdown: every value and what it is."""
    lines = ["| assumed | value | what it is |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| `{f.name}` | {getattr(given, f.name):g} | {f.metadata['said']} |" for f in fields(given)]
    )


def check_point(measured: Mapping[str, Any]) -> str:
    """Markdown: the two processes of this machine."""
    return (
        f"Two processes of {measured['machine']}, {measured['date']}, a step of {measured['prompts']} prompts with "
        f"{measured['group']} samples of the shipped network: **predicted {measured['predicted']:.2f} s, measured "
        f"{measured['measured']:.2f} s** (median of {measured['steps']} steps; error "
        f"{measured['predicted'] / measured['measured'] - 1:+.0%}). Predicted from two runs at the same time that "
        f"know nothing of each other, {measured['alone']:.2f} s a step on half of the prompts, and messages: "
        f"{measured['messages'] / 1e6:.1f} MB of gradients and weights at {measured['rate'] / 1e9:.2f} GB/s (gloo), "
        f"and {1e6 * measured['python']:.0f} microseconds of Python for every sample of all processes."
    )


def page(given: Assumptions) -> str:
    """What stands between the marks in docs/scaling.md."""
    return "\n\n".join([table(rows(given)), assumptions(given), check_point(json.loads(MEASURED.read_text()))])


def put(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def draw(found: Sequence[Row], path: Path) -> None:
    """Efficiency over GPUs: as much work for each GPU, and 512 prompts for all."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "velatura", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
        for side, name, title in zip(axes, ("grows_share", "fixed_share"),
                                     ("4 prompts for each GPU", "512 prompts for all"), strict=True):  # fmt: skip
            for full in (False, True):
                for stage in STAGES:
                    own = [row for row in found if (row.full, row.stage) == (full, stage)]
                    side.plot([row.gpus for row in own], [100 * getattr(row, name) for row in own], marker="o", ms=3,
                              ls="-" if full else "--", color=f"C{stage - 1}",
                              label=f"{'all weights' if full else 'LoRA 32'}, ZeRO {stage}")  # fmt: skip
            side.set(xscale="log", xticks=GPUS, xticklabels=GPUS, xlabel="GPUs", title=title, ylim=(0, 105))
            side.minorticks_off()
            side.grid(alpha=0.3)
        axes[0].set_ylabel("efficiency, %")
        axes[1].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


RECIPE = """
seed: 0
engine: {{kind: deepspeed, zero_stage: 1, threads: 1, device: cpu}}
adapter: {{use: tinyworld, with: {{weights: null}}}}
sampling: {{steps: 4, batch: 64}}
stages:
  teacher:
    stage: rl
    task: {{use: tinyworld, with: {{task: t2i, count: 64, eval_count: 4}}}}
    rewards: [{{use: tinyworld-sharpness, name: sharpness}}]
    steps: {steps}
    prompts_per_step: {prompts}
    group_size: {group}
    micro_batch: 32
    timesteps: {{use: high-noise, with: {{count: 1}}}}
    checkpoint_every: 1000
    pictures_every: 1000
"""
PAIR = """
import json, os, sys, time, torch
from velatura.core.gathered import whole_report
from velatura.core.ranks import join
from velatura.core.types import Prompt, RewardReport
ranks = join("cpu", 300.0)
numbers, samples = torch.zeros(4_000_000), 512
times = {"numbers": [], "report": []}
text = "a red circle on white beside a blue square"
prompts = [Prompt(id=str(i), text=text, task="t2i") for i in range(samples // 16)]
own = samples // 2
part = RewardReport(names=("a", "b", "c"), scores=torch.rand(own, 3), status=torch.zeros(own, 3, dtype=torch.int64),
    weight=torch.ones(own, 3), group=torch.arange(own) // 16, prompts=tuple(prompts[: own // 16]),
    reasons=(("",) * own,) * 3, notes=(("the circle is red, the square is blue, and both are sharp " * 4,) * own,) * 3)
dealt = [list(range(0, len(prompts), 2)), list(range(1, len(prompts), 2))]
for _ in range(12):
    for name, call in (("numbers", lambda: torch.distributed.all_reduce(numbers)),
                       ("report", lambda: whole_report(ranks, part, prompts, dealt))):
        ranks.barrier()
        begin = time.perf_counter()
        call()
        times[name].append(time.perf_counter() - begin)
if ranks.first:
    best = {name: sorted(found)[len(found) // 2] for name, found in times.items()}
    print(json.dumps({"rate": 2 * 4 * numbers.numel() / 2 / best["numbers"], "python": best["report"] / samples}))
"""
"""Two processes: bytes a second of a collective, and seconds that a sample's report takes each of them."""


def run(folder: Path, prompts: int, group: int, steps: int, *options: str) -> subprocess.Popen[str]:
    """A run of the small recipe, begun, in a session of its own like the processes of torchrun: Linux shares a busy CPU
    by sessions."""
    folder.mkdir(parents=True)
    (folder / "scale.yaml").write_text(RECIPE.format(prompts=prompts, group=group, steps=steps))
    return subprocess.Popen(
        [sys.executable, "-m", "velatura.core.cli", "run", "scale.yaml", *options], cwd=folder,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip


def seconds(folder: Path) -> float:
    """Median of a run's steps, after the first two."""
    lines = (folder / "runs" / "scale" / "teacher" / "metrics.jsonl").read_text().splitlines()[2:]
    return statistics.median(json.loads(line)["time/step_s"] for line in lines)


def measure(prompts: int, group: int, steps: int) -> dict[str, Any]:
    """Two processes on this machine by themselves, and at the same time two that belong together."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        started = [run(place / f"alone-{i}", prompts // 2, group, steps, f"seed={i}") for i in (0, 1)]
        started.append(run(place / "both", prompts, group, steps, "--processes", "2"))  # at once: all fare alike
        if any([process.wait() for process in started]):
            raise SystemExit("a run failed")
        (place / "pair.py").write_text(PAIR)
        pair = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             str(place / "pair.py")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = json.loads(pair.stdout.splitlines()[-1])
        weights = load_file(place / "both" / "runs" / "scale" / "teacher" / "weights.safetensors")
        trained = sum(value.numel() for value in weights.values())
        both = seconds(place / "both")
        alone = statistics.mean(seconds(place / f"alone-{i}") for i in (0, 1))
    given = replace(Assumptions(), inside=found["rate"], hop=0.0)
    messages = 2 * FP32 * trained  # fp32: gradients one way, weights back
    told = prompts * group * found["python"]
    return {
        "date": time.strftime("%Y-%m-%d"), "machine": "a machine of two hyperthreads", "prompts": prompts,
        "group": group, "steps": steps - 2, "measured": both, "alone": alone, "messages": messages, **found,
        "predicted": alone + collective(messages, 2, given) + told,
    }  # fmt: skip


def main() -> None:
    """Write the page and the picture; measure first, where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run two processes here, and keep what they took")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="other assumptions; prints, writes nothing"
    )
    asked = parser.parse_args()
    if asked.measure:
        MEASURED.write_text(json.dumps(measure(asked.prompts, asked.group, asked.steps), indent=1) + "\n")
    given = replace(Assumptions(), **{name: float(value) for name, value in (each.split("=") for each in asked.set)})
    print(page(given))
    if not asked.set:
        PAGE.write_text(put(PAGE.read_text(), "scale", page(given)))
        draw(rows(given), PICTURE)


if __name__ == "__main__":
    main()
