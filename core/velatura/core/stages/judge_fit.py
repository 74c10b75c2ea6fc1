"""Fine-tuning a judge on rated pictures: split by prompt, learn, keep the best step, measure it on what is held out."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from velatura.core.agreement import Agreement, Floats, agreement, ceiling
from velatura.core.checkpoint import write_json_atomic
from velatura.core.clusters import Splits, split_lines
from velatura.core.data import EpochSampler
from velatura.core.errors import RecipeError, VelaturaError
from velatura.core.guard import Fault
from velatura.core.judge_model import JudgeModel
from velatura.core.kept_pictures import KeptPictures
from velatura.core.policy import CURRENT, Policy
from velatura.core.ratings import RatingFile, prompt_key
from velatura.core.reward_settings import JUDGE
from velatura.core.seeds import derive
from velatura.core.stages.common import StageRun, Stopwatch, read_log
from velatura.core.stages.rate import RATINGS
from velatura.core.stages.training import Training, loss_note
from velatura.core.types import Status

BEST = "best"
"""The weights that were best on the calibration split."""
CHOSEN_BY = "calibration/quality"
"""Rank correlation with the ratings; of a judge that leaves pictures unmarked, -2 and the share that it marks."""
ENOUGH = 0.99
"""Share of pictures that a usable judge marks."""


def run(stage: StageRun) -> dict[str, Any]:
    """Train, choose the step by the calibration split, measure on the test split, write the judge."""
    config = stage.config
    model: JudgeModel[Any] = stage.build("judge_model", config.judge_model, "judge_model")
    data = RatingFile(_ratings(stage), config.dimension, model.levels)
    splits = split_lines(data.lines, data.path.parent, near=config.near, train=config.train_share,
                         calibration=config.calibration_share)  # fmt: skip
    batches = Batches(stage, data, splits)
    training = Training(stage, sets=(BEST,), result=BEST, policy=Policy(model.load(stage.device)))
    best = _best_before(stage, training.start)

    def step(index: int) -> dict[str, float]:
        nonlocal best
        watch = Stopwatch()
        metrics = _learn(training, model, [data.rated(row) for row in batches.at(index)], watch)
        if (index + 1) % config.validate_every == 0 or index + 1 == config.steps:
            with watch.phase("validate"):
                metrics |= _validated(stage, training.policy, CURRENT, model, data, splits)
            if metrics[CHOSEN_BY] > best:
                best = metrics[CHOSEN_BY]
                training.policy.follow(BEST, 0.0)
        return metrics | watch.seconds

    training.loop(step, loss_note)
    result = training.finish()
    with training.policy.wearing(BEST) as net:
        figures = measured(stage, model, net, data, splits)
        facts = {
            "dimension": config.dimension, "splits": dict(splits.digests()), "stage": stage.name, "figures": figures,
        }  # fmt: skip
        if stage.ranks.first:
            _write(stage.folder / JUDGE, model, net, facts)
            write_json_atomic(stage.folder / "validation.json", facts)
    return result | {"dimension": config.dimension, "judge": JUDGE, "test": figures}


def _ratings(stage: StageRun) -> Path:
    """The file of ratings."""
    if stage.config.rated is not None:
        return Path(stage.run_folder / stage.config.rated / RATINGS)
    return stage.context().resolve(stage.config.ratings)


class Batches:
    """Rows of the train split by step: pictures of a prompt stay together, `together` of them at a time."""

    def __init__(self, stage: StageRun, data: RatingFile, splits: Splits) -> None:
        """Raises `RecipeError` where a split has too little in it."""
        config = stage.config
        counts = {name: len(getattr(splits, name)) for name in ("train", "calibration", "test")}
        if min(counts.values()) == 0:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise RecipeError(
                f"{stage.at('dimension')}: the {len(data)} ratings of {config.dimension!r} are of "
                f"{len(set(splits.clusters))} prompt clusters, which gives a split no picture ({said}). Rate pictures "
                f"of more prompts."
            )
        by_prompt: dict[str, list[int]] = {}
        for row in splits.train:
            by_prompt.setdefault(prompt_key(data.lines[row]), []).append(row)
        self.units = [
            own[first : first + config.together]
            for own in by_prompt.values()
            for first in range(0, len(own), config.together)
        ]
        self.each = max(1, config.batch // config.together)
        if len(self.units) < self.each:
            raise RecipeError(
                f"{stage.at('batch')}: {config.batch} pictures a step were asked for, but the train split has only "
                f"{counts['train']}. Lower `batch`, or rate more pictures."
            )
        self._seed = derive(stage.seed, "judge-fit", stage.name)

    def at(self, step: int) -> list[int]:
        """The rows of a step; a function of the seed and the step alone."""
        sampler = EpochSampler(len(self.units), self.each, self._seed)
        sampler.position = step * self.each
        return [row for unit in islice(iter(sampler), self.each) for row in self.units[unit]]


def _learn(training: Training, model: JudgeModel[Any], rated: Sequence[Any], watch: Stopwatch) -> dict[str, float]:
    """One optimiser step on some rated pictures."""
    size, ranks = training.config.micro_batch, training.run.ranks
    parts = parts_of(rated, size, ranks.size)
    own = [(part, len(part) / len(rated)) for part in ranks.own(parts)]
    own += [(parts[0], 0.0)] * (-(-len(parts) // ranks.size) - len(own))  # who has none left waits in a backward
    with watch.phase("update"):
        of_ranks = ranks.gather(_accumulate(training, model, own))
        names = {name for sums, _ in of_ranks for name in sums}
        metrics = {name: sum(sums.get(name, 0.0) for sums, _ in of_ranks) for name in sorted(names)}
        training.guard.next_update()
        faults = [fault for _, found in of_ranks for fault in found]
        if faults:
            training.engine.zero_grad()
        else:
            info = training.engine.step()
            faults = [] if info.updated else [Fault(0, None, "the gradient is not finite")]
        if faults:
            kept = [KeptPictures(number=number, rated=part) for number, (part, _) in enumerate(own)]
            training.guard.refuse(faults, kept)
            return {"updated": 0.0}
        training.policy.changed()
    return metrics | {"grad_norm": info.grad_norm, "lr": info.lr, "updated": 1.0}


def _accumulate(
    training: Training, model: JudgeModel[Any], own: Sequence[tuple[Sequence[Any], float]]
) -> tuple[dict[str, float], list[Fault]]:
    """Forwards and backwards of this rank's micro-batches, each with its share of the step; sums of what was measured,
    and what of it is not finite."""
    sums: dict[str, float] = defaultdict(float)
    faults = []
    for number, (part, share) in enumerate(own):
        loss = model.loss(training.engine.module, part)
        training.engine.backward(loss.value * share, last=number + 1 == len(own))
        found = float(loss.value.detach())
        sums["loss"] += found * share
        for name, value in loss.metrics.items():
            sums[f"loss/{name}"] += float(value) * share
        if not math.isfinite(found):
            faults.append(Fault(training.run.ranks.rank, number, f"the loss is {found}"))
    return dict(sums), faults


def parts_of(rated: Sequence[Any], size: int, processes: int) -> list[Sequence[Any]]:
    """The pictures of a step in micro-batches of `size`. Where those are too few for the processes there is one for
    each, as even as whole prompts allow: pictures of a prompt are compared with each other."""
    cuts = list(range(0, len(rated), size))
    if len(cuts) < processes:
        starts = [i for i, row in enumerate(rated) if i == 0 or row.sample.prompt.id != rated[i - 1].sample.prompt.id]
        wanted = [rank * len(rated) / processes for rank in range(processes)]
        firsts = sorted({min(starts, key=lambda start: abs(start - at)) for at in wanted})
        cuts = [cut for a, b in pairwise([*firsts, len(rated)]) for cut in range(a, b, size)]
    return [rated[a:b] for a, b in pairwise([*cuts, len(rated)])]


def _best_before(stage: StageRun, start: int) -> float:
    """The best measurement that a run which is resumed has seen."""
    rows = read_log(stage.folder / "metrics.jsonl")
    seen = [row[CHOSEN_BY] for row in rows if CHOSEN_BY in row and row["step"] < start]
    return max(seen, default=-3.0)


def _validated(
    stage: StageRun, policy: Policy, weights: str, model: JudgeModel[Any], data: RatingFile, splits: Splits
) -> dict[str, float]:
    """Agreement on the calibration split, rounded as the log has it, so that a resumed run decides alike."""
    with policy.wearing(weights) as net:
        marks, rows = _marks(stage, model, net, data, splits.calibration)
    found = _agreement(stage, marks, rows, data, splits, "mean", bootstrap=0)
    marked = len(rows) / len(splits.calibration)
    usable = found.spearman if marked >= ENOUGH else None
    values = {CHOSEN_BY: marked - 2 if usable is None else usable, "calibration/marked": marked}
    values |= {
        f"calibration/{name}": value
        for name, value in (("spearman", found.spearman), ("pairwise", found.pairwise))
        if value is not None
    }
    return {name: round(value, 6) for name, value in values.items()}


def measured(stage: StageRun, model: JudgeModel[Any], net: Any, data: RatingFile, splits: Splits) -> dict[str, Any]:
    """What the judge is worth on the test split, which nothing was chosen by: against the raters, against each other,
    and against the truth where that is known."""
    marks, rows = _marks(stage, model, net, data, splits.test)
    if not rows:
        raise VelaturaError(
            f"stage '{stage.name}': the judge gives no picture of the test split a mark; it has not learnt to answer "
            f"with a level yet. Take more steps, or a larger weight of a loss on tokens (cross_entropy, soft)."
        )
    ratings = [data.lines[row].ratings for row in rows]
    prompts = [prompt_key(data.lines[row]) for row in rows]
    clusters = [splits.clusters[row] for row in rows]
    known = [i for i, row in enumerate(rows) if data.lines[row].truth is not None]
    figures: dict[str, Any] = {
        "pictures": len(rows), "not_marked": len(splits.test) - len(rows),
        "mean_squared_error": float(np.mean((marks - np.array([np.mean(own) for own in ratings])) ** 2)),
        "judge_and_ratings": asdict(
            _agreement(stage, marks, rows, data, splits, "mean", bootstrap=stage.config.bootstrap)
        ),
        "leave_one_rater_out": ceiling(ratings, marks, prompts, clusters),
    }  # fmt: skip
    if known:
        own = [rows[i] for i in known]
        for name, side in (
            ("judge_and_truth", marks[known]),
            ("one_rater_and_truth", np.array([data.lines[row].ratings[0] for row in own])),
            ("mean_rating_and_truth", np.array([np.mean(data.lines[row].ratings) for row in own])),
        ):
            figures[name] = asdict(
                _agreement(stage, side, own, data, splits, "truth", bootstrap=stage.config.bootstrap)
            )
    return figures


def _agreement(
    stage: StageRun, marks: Floats, rows: Sequence[int], data: RatingFile, splits: Splits, target: str, *,
    bootstrap: int,
) -> Agreement:  # fmt: skip
    """Of marks with the mean rating, or with the truth."""
    lines = [data.lines[row] for row in rows]
    values = [line.truth if target == "truth" else float(np.mean(line.ratings)) for line in lines]
    return agreement(
        marks, np.array(values, dtype=np.float64), [prompt_key(line) for line in lines],
        [splits.clusters[row] for row in rows], bootstrap=bootstrap, seed=stage.seed,
    )  # fmt: skip


def _marks(
    stage: StageRun, model: JudgeModel[Any], net: Any, data: RatingFile, rows: Sequence[int]
) -> tuple[Floats, list[int]]:
    """Marks of the pictures that got one, and which those are."""
    size = stage.config.marked_at_once
    values: list[float] = []
    given: list[int] = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        with torch.no_grad():
            scores = model.mark(net, [data.rated(row).sample for row in part])
        for row, value, status in zip(part, scores.values.tolist(), scores.status, strict=True):
            if status is Status.OK:
                values.append(value)
                given.append(row)
    if len(given) < len(rows):
        logger.warning("{}: {} of {} pictures got no mark", stage.name, len(rows) - len(given), len(rows))
    return np.array(values, dtype=np.float64), given


def _write(folder: Path, model: JudgeModel[Any], net: Any, facts: Mapping[str, Any]) -> None:
    """The judge's folder, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    for path in (temporary, folder):
        if path.exists():
            shutil.rmtree(path)
    temporary.mkdir(parents=True)
    model.save(net, temporary, facts)
    temporary.rename(folder)
