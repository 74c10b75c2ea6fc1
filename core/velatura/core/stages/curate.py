"""Prompt curation: sample a group per prompt from the base, keep prompts whose rewards leave room to learn.

Qwen-Image-2.0-RL keeps a prompt when max_i R_i - min_i R_i of the composite exceeds a threshold; the composite is
taken before any normalisation, because a z-scored group always has about the same range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from velatura.core.checkpoint import write_json_atomic
from velatura.core.components import PromptFilter
from velatura.core.errors import RecipeError
from velatura.core.interruption import INTERRUPTION
from velatura.core.judge import Judge
from velatura.core.ledger import Row, by_category, is_asleep, read_rows, rows_of, states_by_category, write_rows
from velatura.core.pictures import overview, save_png
from velatura.core.policy import CURRENT, Policy
from velatura.core.rollout import Sampler, rollout
from velatura.core.seeds import derive
from velatura.core.stages.common import StageRun, Ticker
from velatura.core.stages.reward_metrics import counted, failed_in
from velatura.core.types import Admission, Prompt, RewardReport
from velatura.core.weight_ledger import read_calibration, require_calibrated

SHOWN = 6
"""Groups of each kind in the pictures."""
FAILURES = "failures"
"""Of a block: scores that failed in all of its passes."""


def run(stage: StageRun) -> dict[str, Any]:
    """Measure every prompt, decide, look again at what is borderline, write the ledger."""
    config = stage.config
    adapter = stage.adapter()
    policy = stage.load_policy(adapter, config.model)
    sampler = stage.sampler(adapter)
    prompt_filter = stage.build("prompt_filter", config.prompt_filter, "prompt_filter")
    prompts, before = _to_screen(stage)
    if config.weights_from is not None:
        calibration = read_calibration(stage.run_folder, config.weights_from)
        require_calibrated(calibration, prompts, config.weights_from, stage.at("weights_from"))
    screening = Screening(stage=stage, policy=policy, sampler=sampler, prompt_filter=prompt_filter)
    if prompts:
        report, admission, counts = screening.decide(prompts)
        if stage.ranks.first:
            draw_examples(stage, policy, sampler, prompts, report, admission)
        before += rows_of(report, admission, config.model)
    else:
        counts = {"failures": 0, "failures_by_category": {}, "confirmed": 0}
    if not stage.ranks.first:
        return {}
    write_rows(stage.folder / "ledger.parquet", before)
    kept = [row["prompt_id"] for row in before if row["keep"]]
    write_json_atomic(stage.folder / "kept.json", {"prompt_ids": kept})
    return {
        "prompts": len(before), "kept": len(kept), **counts,
        "by_category": by_category(before), "states_by_category": states_by_category(before),
    }  # fmt: skip


def _look(stage: StageRun) -> str:
    """Names the seeds of the first look: those of a second stage are fresh."""
    return "" if stage.config.after is None else f"again-{stage.name}"


def _to_screen(stage: StageRun) -> tuple[list[Prompt], list[Row]]:
    """The prompts to look at, and the rows of an earlier ledger that stay as they are."""
    config = stage.config
    train = stage.task_of(stage.name).prompts("train")
    if config.after is None:
        return [train[i] for i in range(min(len(train), config.max_prompts or len(train)))], []
    if stage.recipe.task_of(config.after) != config.task:
        raise RecipeError(f"{stage.at('after')}: stage '{config.after}' has another task. Give both the same.")
    rows = read_rows(stage.run_folder / config.after / "ledger.parquet")
    asleep = [row["prompt_id"] for row in rows if is_asleep(row)][: config.max_prompts]
    wanted = set(asleep)
    found = [prompt for prompt in (train[i] for i in range(len(train))) if prompt.id in wanted]
    return found, [row for row in rows if row["prompt_id"] not in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """What measuring takes."""

    stage: StageRun
    policy: Policy
    sampler: Sampler
    prompt_filter: PromptFilter[Any]

    def decide(self, prompts: Sequence[Prompt]) -> tuple[RewardReport, Admission, dict[str, Any]]:
        """A decision on each prompt, on a second look where the first was borderline; and what there is to count."""
        stage, config = self.stage, self.stage.config
        with stage.judge(config.rewards, config.max_failed) as judge:
            report, failures = self.measured(judge, prompts, _look(stage))
            admission = self.prompt_filter.admit(report)
            reports, confirmed = [report], 0
            if config.confirm and len(rows := _borderline(stage, admission)):
                look = "-".join(filter(None, ["confirm", _look(stage)]))
                fresh, more = self.measured(judge, [prompts[row] for row in rows], look)
                failures += more
                admission = confirmation(admission, self.prompt_filter.admit(fresh), rows)
                reports, confirmed = [report, fresh], len(rows)
        return report, admission, {
            "failures": failures, "failures_by_category": counted(reports), "confirmed": confirmed
        }  # fmt: skip

    def measured(self, judge: Judge, prompts: Sequence[Prompt], look: str) -> tuple[RewardReport, int]:
        """The report of a look at prompts, and how many scores failed, interruptions included; each look has seeds of
        its own."""
        size = max(1, self.stage.config.sampling.batch // self.stage.config.group_size)
        with self.stage.progress(len(prompts), unit="prompts") as bar:
            firsts = range(0, len(prompts), size)
            own = {}
            for i in self.stage.ranks.own(firsts):
                if INTERRUPTION.asked:
                    break
                own[i] = self._block(judge, prompts[i : i + size], look, i, bar)
            self.stage.leave_if_asked()  # and what the others measured is on disk
            blocks = [own.get(i) or self._block(judge, prompts[i : i + size], look, i, bar) for i in firsts]
            return _whole([report for report, _ in blocks], prompts), sum(failures for _, failures in blocks)

    def _block(
        self, judge: Judge, prompts: Sequence[Prompt], look: str, first: int, bar: Ticker
    ) -> tuple[RewardReport, int]:
        """The report of one block of prompts with its failures, from disk when an earlier run already made it."""
        path = self.stage.folder / ("-".join(["blocks", look]) if look else "blocks") / f"{first:06d}.safetensors"
        if path.exists():
            bar.tick("measured before", len(prompts))
            names = tuple(reward.label for reward in judge.rewards)
            stored: dict[str, Any] = load_file(path)
            failures = int(stored.pop(FAILURES, failed_in(stored["status"])))
            return RewardReport(names=names, prompts=tuple(prompts), **stored), failures
        passes: list[int] = []
        with self.policy.wearing(CURRENT) as net:
            for chunk in rollout(net, self.sampler, prompts, group_seeds(self.stage, prompts, look)):
                for repeat in range(self.stage.config.repeats or 1):
                    judge.submit(chunk.samples, repeat)
                    passes += [repeat] * len(chunk.samples)
        every = judge.report(prompts)
        report, failures = by_pass(every, torch.tensor(passes)), failed_in(every.status)
        _save_block(path, report, failures)
        bar.tick("", len(prompts))
        return report, failures


def by_pass(report: RewardReport, passes: Tensor) -> RewardReport:
    """A report of several passes over the same samples as one of the first pass, with the others as repeats."""
    first = passes == 0
    scores = torch.where(report.valid, report.scores, torch.nan)
    further = [scores[passes == k] for k in range(1, int(passes.max()) + 1)]
    return replace(
        report, scores=report.scores[first], status=report.status[first], weight=report.weight[first],
        group=report.group[first], repeats=torch.stack(further) if further else None,
        reasons=tuple(_chosen(texts, first) for texts in report.reasons),
        notes=tuple(_chosen(texts, first) for texts in report.notes),
    )  # fmt: skip


def _chosen(texts: Sequence[str], rows: Tensor) -> tuple[str, ...]:
    return tuple(text for text, is_chosen in zip(texts, rows.tolist(), strict=True) if is_chosen)


def _borderline(stage: StageRun, admission: Admission) -> list[int]:
    """Rows of the decisions that another look might turn."""
    if admission.borderline is None or admission.threshold is None:
        raise RecipeError(
            f"{stage.at('confirm')}: prompt_filter '{stage.config.prompt_filter.use}' does not say which decisions are "
            f"borderline. Leave `confirm` out, or take 'range'."
        )
    return [int(row) for row in torch.nonzero(admission.borderline).flatten()]


def confirmation(first: Admission, fresh: Admission, rows: Sequence[int]) -> Admission:
    """`first`, with the decisions on `rows` taken on the mean of both ranges.

    What lies just above a threshold is there partly by luck: on 8 samples about a quarter of the prompts that a
    quantile of one half keeps fall below it when they are measured again. The threshold stays that of the first look,
    which saw whole categories. What the second look finds to be failed, noisy, hackable or at an end of the scale is.
    """
    keep, statistic = first.keep.clone(), first.statistic.clone()
    reason, states = list(first.reason), list(first.state)
    threshold = first.threshold if first.threshold is not None else torch.full_like(statistic, torch.nan)
    for j, row in enumerate(rows):
        one, two, tau = float(first.statistic[row]), float(fresh.statistic[j]), float(threshold[row])
        if fresh.state and fresh.state[j] not in ("active", "flat"):
            keep[row], states[row], reason[row] = False, fresh.state[j], f"on a second look {fresh.reason[j]}"
            continue
        mean = (one + two) / 2
        stays = mean >= tau and mean > 0
        statistic[row], keep[row], states[row] = mean, stays, "active" if stays else "flat"
        both = f"mean range {mean:.4g} of two looks ({one:.4g}, {two:.4g})"
        reason[row] = f"kept: {both}" if stays else f"{both} < {tau:.4g}"
    return replace(first, keep=keep, statistic=statistic, reason=tuple(reason), state=tuple(states))


def group_seeds(stage: StageRun, prompts: Sequence[Prompt], look: str = "") -> list[list[int]]:
    """Seeds of the curation samples, disjoint from those of training and evaluation, and of other looks."""
    path = ("curate", look) if look else ("curate",)
    return [[derive(stage.seed, *path, p.id, j) for j in range(stage.config.group_size)] for p in prompts]


def _save_block(path: Path, report: RewardReport, failures: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"scores": report.scores, "status": report.status, "weight": report.weight, "group": report.group}
    tensors[FAILURES] = torch.tensor(failures)
    if report.repeats is not None:
        tensors["repeats"] = report.repeats
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _whole(reports: Sequence[RewardReport], prompts: Sequence[Prompt]) -> RewardReport:
    """One report of all blocks, groups renumbered."""
    offsets = [0]
    for report in reports:
        offsets.append(offsets[-1] + len(report.prompts))
    return RewardReport(
        names=reports[0].names,
        scores=torch.cat([r.scores for r in reports]),
        status=torch.cat([r.status for r in reports]),
        weight=torch.cat([r.weight for r in reports]),
        group=torch.cat([r.group + offset for r, offset in zip(reports, offsets, strict=False)]),
        prompts=tuple(prompts),
        repeats=torch.cat([r.repeats for r in reports if r.repeats is not None], 1) if reports[0].repeats is not None
        else None,
    )  # fmt: skip


def draw_examples(
    stage: StageRun, policy: Policy, sampler: Sampler, prompts: Sequence[Prompt], report: RewardReport,
    admission: Admission,
) -> None:  # fmt: skip
    """A picture of some kept and some dropped groups, drawn again from their seeds."""
    folder, look = stage.folder / "pictures", _look(stage)
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for name, wanted in (("kept", True), ("dropped", False)):
        chosen = [i for i, keep in enumerate(admission.keep.tolist()) if keep is wanted]
        chosen = chosen[:: max(1, len(chosen) // SHOWN)][:SHOWN]
        if not chosen:
            continue
        own = [prompts[i] for i in chosen]
        rows: list[list[Any]] = [list(p.sources) for p in own]
        with policy.wearing(CURRENT) as net:
            for chunk in rollout(net, sampler, own, group_seeds(stage, own, look)):
                for sample in chunk.samples:
                    rows[sample.group].append(sample.image)
        save_png(folder / f"{name}.png", overview(rows))
        captions[f"{name}.png"] = f"{name}: " + " · ".join(f"{prompts[i].text} ({admission.reason[i]})" for i in chosen)
    write_json_atomic(folder / "captions.json", captions)
