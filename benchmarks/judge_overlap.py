"""How much of a slow judge's time disappears behind the drawing of pictures: a timeline, and a share.

A real `vlm-judge` asks a server on this machine that takes a second for every picture, as a judge of 8 billion weights
that reasons does. Pictures come from the real rollout of the shipped network, whose solver steps are chosen so that a
batch of them takes as long as is asked for (`--draw`, 1.5 s), because a large model is not on hand.

    hidden share = 1 - (seconds the step waits for scores after its last picture) / (seconds in which the judge works)

With N batches that each take longer to draw than to judge, only the last batch's second is waited for: 1 - 1/N.

    python benchmarks/judge_overlap.py                        # half a minute
    python benchmarks/judge_overlap.py --prompts 12 --picture overlap.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from velatura.api import Context, Sample, Scores
from velatura.core.judge import Judge, WeightedReward
from velatura.core.rollout import Sampler, rollout
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter
from velatura.plugins.guidance.policies import NoGuidance
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.reward import VlmJudge
from velatura.schedulers.kernels import Ode

WIDTH = 72
"""Characters of the timeline."""
LOCAL = "127.0.0.1"
Interval = tuple[float, float]


@dataclass
class Timeline:
    """When pictures were drawn, when the judge worked, and when the step did nothing but wait."""

    drawing: list[Interval] = field(default_factory=list)
    judging: list[Interval] = field(default_factory=list)
    waiting: list[Interval] = field(default_factory=list)

    @property
    def hidden(self) -> float:
        """Share of the judge's time that the step did not wait for."""
        work = covered(self.judging)
        return 1 - covered(self.waiting) / work if work else math.nan

    def text(self) -> str:
        """One line for each, on one scale."""
        end = max(stop for part in (self.drawing, self.judging, self.waiting) for _, stop in part)
        rows = (("draws", self.drawing, "█"), ("judges", self.judging, "▒"), ("waits", self.waiting, "░"))
        lines = [f"{name:>7} |{bar(part, end, mark)}| {covered(part):5.1f} s" for name, part, mark in rows]
        return "\n".join([*lines, f"{'':>7}  0{'':{WIDTH - 8}}{end:5.1f} s"])


def covered(parts: Sequence[Interval]) -> float:
    """Seconds in at least one of the intervals."""
    total, reached = 0.0, -math.inf
    for start, stop in sorted(parts):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def bar(parts: Sequence[Interval], end: float, mark: str) -> str:
    """Intervals of [0, end] in characters: a mark where at least half of the character's time is covered."""
    step = end / WIDTH
    cells = [
        covered([(max(a, i * step), min(b, (i + 1) * step)) for a, b in parts if a < (i + 1) * step and b > i * step])
        for i in range(WIDTH)
    ]
    return "".join(mark if cell >= step / 2 else " " for cell in cells)


class Slow(BaseHTTPRequestHandler):
    """Answers a chat request after a while, with probabilities of the levels that depend on the picture."""

    protocol_version = "HTTP/1.1"
    seconds = 1.0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.seconds)
        level = 1 + sum(body) % 5
        chosen = {str(i): 0.8 if i == level else 0.04 for i in range(1, 6)}
        tokens = [{"token": t, "logprob": -0.1, "top_logprobs": []} for t in ("Score", ":", " [", str(level), "]")]
        tokens[3]["top_logprobs"] = [{"token": t, "logprob": math.log(p)} for t, p in chosen.items()]
        tokens[3]["logprob"] = math.log(chosen[str(level)])
        message = {"role": "assistant", "content": f"Score: [{level}]"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": tokens}}
        answer = json.dumps({"model": json.loads(body)["model"], "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


class Watched(VlmJudge):
    """The judge, with a note of when it works."""

    timeline: Timeline
    begin: float

    def score(self, samples: Sequence[Sample]) -> Scores:
        start = time.perf_counter() - self.begin
        scores = super().score(samples)
        self.timeline.judging.append((start, time.perf_counter() - self.begin))
        return scores


def step(judge: Watched, sampler: Sampler, net: Any, prompts: Sequence[Any], group: int) -> tuple[Timeline, int]:
    """Draw and judge, as a step of the `rl` stage does; and how many pictures got a score."""
    timeline = judge.timeline = Timeline()
    reward = WeightedReward(label="judge", at="benchmark", model=judge, threads=1)
    seeds = [[100 * p + j for j in range(group)] for p in range(len(prompts))]
    with Judge([reward], max_failed=1.0, retries=0) as judging:
        judge.begin = mark = time.perf_counter()
        for chunk in rollout(net, sampler, prompts, seeds):
            timeline.drawing.append((mark - judge.begin, time.perf_counter() - judge.begin))
            judging.submit(chunk.samples)
            mark = time.perf_counter()
        report = judging.report(prompts)
        timeline.waiting.append((mark - judge.begin, time.perf_counter() - judge.begin))
    return timeline, int(report.valid.sum())


def solver_steps(adapter: TinyWorldAdapter, net: Any, prompts: Sequence[Any], group: int, seconds: float) -> int:
    """How many steps make drawing one batch take that long here."""
    times = []
    for steps in (2, 12):
        sampler = Sampler(adapter=adapter, guidance=NoGuidance(), kernel=Ode(), steps=steps, batch=group)
        begin = time.perf_counter()
        list(rollout(net, sampler, prompts[:1], [list(range(group))]))
        times.append(time.perf_counter() - begin)
    return max(2, math.ceil(seconds / max(1e-3, (times[1] - times[0]) / 10)))


def measured(arguments: argparse.Namespace) -> tuple[Timeline, int, int]:
    """The timeline of one step, its pictures, and those that got a score."""
    Slow.seconds = arguments.seconds
    server = ThreadingHTTPServer((LOCAL, 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        adapter = TinyWorldAdapter()
        net = adapter.load(torch.device("cpu"))
        task = TinyWorld(TinyWorldOptions(task="t2i", count=max(8, arguments.prompts)))
        prompts = [task.prompts("train")[i] for i in range(arguments.prompts)]
        steps = solver_steps(adapter, net, prompts, arguments.group, arguments.draw)
        judge = Watched(VlmJudgeOptions(
            rubric="alignment", model="slow", server=f"http://{LOCAL}:{server.server_address[1]}/v1",
            reasoning_tokens=0, concurrency=arguments.group,
        ))  # fmt: skip
        judge.timeline, judge.begin = Timeline(), time.perf_counter()
        judge.setup(Context(device=torch.device("cpu"), cache=Path.home(), seed=0, base=Path.cwd()))
        sampler = Sampler(adapter=adapter, guidance=NoGuidance(), kernel=Ode(), steps=steps, batch=arguments.group)
        timeline, scored = step(judge, sampler, net, prompts, arguments.group)
    finally:
        server.shutdown()
        server.server_close()
    return timeline, arguments.prompts * arguments.group, scored


def draw(timeline: Timeline, path: Path) -> None:
    """The same as a picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.8), layout="constrained")
    rows = (("waits", timeline.waiting, "0.75"), ("judges", timeline.judging, "tab:orange"),
            ("draws", timeline.drawing, "tab:blue"))  # fmt: skip
    for y, (_, parts, colour) in enumerate(rows):
        axes.broken_barh([(a, b - a) for a, b in parts], (y - 0.4, 0.8), color=colour, edgecolor="white")
    axes.set_yticks(range(3), [name for name, _, _ in rows])
    axes.set_xlabel("seconds of a step")
    axes.set_title(f"{timeline.hidden:.0%} of the judge's time is hidden", loc="left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of the judge for a picture")
    parser.add_argument("--draw", type=float, default=1.5, help="seconds to draw a batch, about")
    parser.add_argument("--prompts", type=int, default=8, help="of a step; each is a batch")
    parser.add_argument("--group", type=int, default=8, help="pictures of a prompt, judged at the same time")
    parser.add_argument("--picture", type=Path, help="draw the timeline to this file, too")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    timeline, pictures, scored = measured(arguments)
    print(timeline.text())
    print(f"{scored} of {pictures} pictures scored; hidden share of the judge: {timeline.hidden:.1%}")
    if arguments.picture:
        draw(timeline, arguments.picture)
    if arguments.json:
        arguments.json.write_text(json.dumps({
            "hidden": timeline.hidden, "judge_s": covered(timeline.judging), "waited_s": covered(timeline.waiting),
            "drawing_s": covered(timeline.drawing), "pictures": pictures, "scored": scored,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
