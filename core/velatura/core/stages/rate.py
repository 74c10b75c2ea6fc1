"""Pictures with ratings: draw groups for every prompt, ask the raters, write what a judge is fitted to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from velatura.core.checkpoint import write_text_atomic
from velatura.core.interruption import INTERRUPTION
from velatura.core.judge import Judge
from velatura.core.pictures import overview, save_png, to_pixels
from velatura.core.policy import CURRENT, Policy
from velatura.core.ratings import line_of
from velatura.core.rollout import Sampler, rollout
from velatura.core.seeds import derive, generator
from velatura.core.stages.common import StageRun
from velatura.core.stages.reward_metrics import failed_in
from velatura.core.types import Prompt, RewardReport, Sample

RATINGS = "ratings.jsonl"
FAILURES = ".failures.json"
"""Ending of the file beside a block with how many of its scores failed."""
SHOWN = 6
"""Groups in the picture."""


def run(stage: StageRun) -> dict[str, Any]:
    """Draw, ask, write `ratings.jsonl` and its pictures; blocks that an earlier run finished are kept."""
    config = stage.config
    adapter = stage.adapter()
    policy = stage.load_policy(adapter, config.model)
    sampler = stage.sampler(adapter)
    train = stage.task_of(stage.name).prompts("train")
    count = min(len(train), config.max_prompts or len(train))
    prompts = [train[i] for i in range(count)]
    size = max(1, config.sampling.batch // config.group_size)
    lines: list[str] = []
    with _judge(stage) as judge, stage.progress(count, unit="prompts") as bar:
        files = {first: stage.folder / "blocks" / f"{first:06d}.jsonl" for first in range(0, count, size)}
        for first in stage.ranks.own(list(files)):
            if INTERRUPTION.asked:
                break
            block = prompts[first : first + size]
            if not files[first].exists():
                made, failed = _block(stage, policy, sampler, judge, block, prompts, first)
                write_text_atomic(files[first].with_suffix(FAILURES), json.dumps(failed))
                write_text_atomic(files[first], made)
            bar.tick("", len(block))
        stage.leave_if_asked()  # and what the others rated is on disk
    if not stage.ranks.first:
        return {}
    failures = sum(_failures(path) for path in files.values())
    for path in files.values():
        lines += path.read_text(encoding="utf-8").split("\n")[:-1]  # text may hold other line separators
    write_text_atomic(stage.folder / RATINGS, "".join(f"{line}\n" for line in lines))
    by_dimension: dict[str, int] = {}
    for line in lines:
        dimension = json.loads(line)["dimension"]
        by_dimension[dimension] = by_dimension.get(dimension, 0) + 1
    return {"prompts": count, "ratings": by_dimension, "failures": failures}


def _failures(block: Path) -> int:
    """Scores that failed when a block was rated; a block from before they were counted says nothing of them."""
    path = block.with_suffix(FAILURES)
    return int(json.loads(path.read_text())) if path.exists() else 0


def _judge(stage: StageRun) -> Judge:
    """All raters, then those who know the truth."""
    asked = [("raters", i, ref) for i, ref in enumerate(stage.config.raters)]
    asked += [("truth", i, ref) for i, ref in enumerate(stage.config.truth)]
    rewards = [stage.reward(ref, f"{slot}.{i}", label=f"{slot} {i}: {ref.label}") for slot, i, ref in asked]
    return Judge(rewards, max_failed=stage.config.max_failed, ranks=stage.ranks)


def _block(
    stage: StageRun, policy: Policy, sampler: Sampler, judge: Judge, block: Sequence[Prompt], prompts: Sequence[Prompt],
    first: int,
) -> tuple[str, int]:  # fmt: skip
    """Lines for the pictures of some prompts, which are written beside them, and how many scores failed."""
    seeds = [[derive(stage.seed, "rate", p.id, j) for j in range(stage.config.group_size)] for p in block]
    samples: list[Sample] = []
    with policy.wearing(CURRENT) as net:
        for chunk in rollout(net, sampler, block, seeds):
            samples += chunk.samples
    shown = [_seen(stage, sample, prompts) for sample in samples]
    judge.submit(shown)
    report = judge.report(block)
    if first == 0:
        groups: dict[int, list[torch.Tensor]] = {}
        for sample in samples:
            groups.setdefault(sample.group, []).append(sample.image)
        save_png(stage.folder / "pictures" / "drawn.png", overview([groups[g] for g in sorted(groups)[:SHOWN]]))
    lines = []
    for row, sample in enumerate(shown):
        image = f"images/{first:06d}-{row:04d}.png"
        save_png(stage.folder / image, to_pixels(sample.image))
        sources = _write_sources(stage.folder, sample.prompt)
        lines += [line_of({"image": image, "sources": sources, **own}) for own in _rated(stage, sample, report, row)]
    return "".join(f"{line}\n" for line in lines), failed_in(report.status)


def _seen(stage: StageRun, sample: Sample, prompts: Sequence[Prompt]) -> Sample:
    """A picture with the prompt that it is rated for: its own, or another one of its category. In the 8 bits that the
    file has."""
    pixels = torch.from_numpy(to_pixels(sample.image).copy()).permute(2, 0, 1).float() / 255
    draw = generator(stage.seed, "rate", "mismatched", sample.prompt.id, str(sample.seed))
    luck = float(torch.rand((), generator=draw))
    prompt = sample.prompt
    if luck < stage.config.mismatched and not prompt.sources:
        others = [p for p in prompts if p.category == prompt.category and p.text != prompt.text and not p.sources]
        if others:
            prompt = others[int(torch.randint(len(others), (), generator=draw))]
    return replace(sample, image=pixels, prompt=prompt)


def _write_sources(folder: Path, prompt: Prompt) -> list[str]:
    """Source pictures, one file for each that differs."""
    names = []
    for source in prompt.sources:
        pixels = to_pixels(source)
        name = f"images/source-{derive(0, pixels.tobytes().hex()):016x}.png"
        if not (folder / name).exists():
            save_png(folder / name, pixels)
        names.append(name)
    return names


def _rated(stage: StageRun, sample: Sample, report: RewardReport, row: int) -> list[Mapping[str, Any]]:
    """What was said of one picture, dimension by dimension. Where a rating failed the dimension is left out: none is
    made up, and none moves to another rater's place."""
    config = stage.config
    refs = [*config.raters, *config.truth]
    said = [
        round(float(value), 6) if ok else None
        for value, ok in zip(report.scores[row].tolist(), report.valid[row].tolist(), strict=True)
    ]
    found: list[Mapping[str, Any]] = []
    for dimension in dict.fromkeys(ref.dimension for ref in config.raters):
        own = [value for ref, value in zip(refs, said, strict=True) if ref.dimension == dimension]
        voices = sum(ref.dimension == dimension for ref in config.raters)
        ratings = [value for value in own[:voices] if value is not None]
        if len(ratings) == voices:  # a list with a gap would take one rater for another
            line = {"prompt": sample.prompt.text, "category": sample.prompt.category, "dimension": dimension}
            truth = {"truth": own[voices]} if own[voices:] and own[voices] is not None else {}
            found.append({**line, "ratings": ratings, **truth})
    return found
