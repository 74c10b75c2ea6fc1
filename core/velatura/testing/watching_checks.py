"""Checks of tasks, evaluators, observers and judge models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from velatura.core.components import Evaluator, Observer
from velatura.core.events import CheckpointSaved, RolloutDone, RunEnd, RunStart, StepEnd
from velatura.core.ratings import Rated
from velatura.core.types import Prompt, Rollout, RolloutPart, Sample, StepPlan
from velatura.testing.kit import NotChecked, Subject, check, require, require_finite, untouched
from velatura.testing.samples import make_report, make_samples

SOME = 24
"""Prompts of a split that are looked at: it may be as long as it likes."""
SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")


def _some(subject: Subject, split: Literal["train", "eval"]) -> list[Prompt]:
    prompts = subject.ready().prompts(split)
    require(len(prompts) > 0, f"split {split!r} has no prompts")
    return [prompts[i] for i in range(min(SOME, len(prompts)))]


@check("task")
def every_prompt_has_an_id_of_its_own(subject: Subject) -> None:
    """Texts may repeat, ids may not, within a split."""
    for split in SPLITS:
        ids = [prompt.id for prompt in _some(subject, split)]
        require(len(set(ids)) == len(ids), f"split {split!r} has two prompts of one id among its first {len(ids)}")


@check("task")
def prompts_are_always_the_same(subject: Subject) -> None:
    """By index, in a fixed order, from run to run: prompts and seeds pair pictures of different models."""
    for split in SPLITS:
        first, second = _some(subject, split), _some(subject, split)
        for i, (one, two) in enumerate(zip(first, second, strict=True)):
            same = (one.id, one.text, one.task, one.category) == (two.id, two.text, two.task, two.category)
            same = same and all(torch.equal(a, b) for a, b in zip(one.sources, two.sources, strict=True))
            require(same, f"prompt {i} of split {split!r} is another one the second time")


@check("task")
def sources_are_pictures(subject: Subject) -> None:
    """`3 H W` in [0, 1]; categories have shares that sum to 1."""
    for split in SPLITS:
        for prompt in _some(subject, split):
            require(abs(sum(prompt.membership.values()) - 1) < 1e-6, f"prompt {prompt.id}: shares do not sum to 1")
            for picture in (*prompt.sources, *(() if prompt.target is None else (prompt.target,))):
                require(
                    picture.ndim == 3 and len(picture) == 3, f"prompt {prompt.id}: a source is {list(picture.shape)}"
                )
                inside = float(picture.min()) >= 0 and float(picture.max()) <= 1
                require(inside, f"prompt {prompt.id}: a source has values outside [0, 1]")


def _measured(subject: Subject) -> tuple[Evaluator[Any], list[Sample], Mapping[str, Sequence[float | None]]]:
    evaluator: Evaluator[Any] = subject.ready()
    samples = subject.pictures()
    with untouched("`evaluate`", *(sample.image for sample in samples)):
        found = evaluator.evaluate(samples)
    if not any(value is not None for values in found.values() for value in values):
        raise NotChecked("it measures nothing of the prompts tried; name some that it measures: `prompts=[...]`")
    return evaluator, samples, found


@check("evaluator")
def one_value_per_metric_and_sample(subject: Subject) -> None:
    """A finite number, or None where the metric does not apply; pictures are left as they are."""
    _, samples, found = _measured(subject)
    for name, values in found.items():
        require(len(values) == len(samples), f"metric {name!r} has {len(values)} values for {len(samples)} samples")
        wrong = [value for value in values if value is not None and not math.isfinite(value)]
        require(not wrong, f"metric {name!r} has the value {wrong[0] if wrong else ''}; use None where there is none")


@check("evaluator")
def values_do_not_depend_on_the_order(subject: Subject) -> None:
    """Differences between models are taken sample by sample."""
    evaluator, samples, found = _measured(subject)
    again = evaluator.evaluate(samples[::-1])
    require(set(again) == set(found), "other metrics when samples come in another order")
    for name, values in found.items():
        for a, b in zip(values, list(again[name])[::-1], strict=True):
            same = a is b is None or (
                a is not None and b is not None and math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)
            )
            require(same, f"metric {name!r} changes with the order of the samples: {a} and {b}")


def _events(folder: Path) -> list[tuple[str, Any]]:
    """Those of a stage of two steps, in their order."""
    report = make_report()
    samples = tuple(make_samples(report.prompts, per_prompt=4))
    times = torch.linspace(1, 0, 3)
    part = RolloutPart(
        start=0, latents=torch.zeros(len(samples), 2), times=times, plan=StepPlan.training(torch.tensor([0]), steps=2)
    )
    rollout = Rollout(prompts=report.prompts, samples=samples, group=report.group, parts=(part,))
    events: list[tuple[str, Any]] = [
        ("run_start", RunStart(stage="teacher", kind="rl", folder=folder, step=0, total=2, config={"stage": "rl"}))
    ]
    for step in range(2):
        events += [
            ("rollout_done", RolloutDone(step=step, rollout=rollout, report=report if step else None)),
            ("step_end", StepEnd(step=step, metrics={"loss": 0.5, "reward/redness/mean": math.nan})),
            ("checkpoint_saved", CheckpointSaved(step=step + 1, folder=folder)),
        ]
    return events


@check("observer")
def no_event_raises_or_is_changed(subject: Subject) -> None:
    """From the start of a stage to its end, NaN metrics and a rollout without report among them."""
    _watched(subject, None)


@check("observer")
def it_survives_a_stage_that_fails(subject: Subject) -> None:
    """The last event may carry an error."""
    _watched(subject, "RewardError: the budget of failures is used up")


def _watched(subject: Subject, error: str | None) -> None:
    with TemporaryDirectory(prefix="velatura-check-") as name:
        observer: Observer[Any] = subject.ready()
        events = [*_events(Path(name)), ("run_end", RunEnd(step=2, error=error))]
        done = next(event for which, event in events[::-1] if which == "rollout_done")
        tensors = [done.report.scores, done.report.status, done.rollout.parts[0].latents]
        with untouched("the observer", *tensors, *(sample.image for sample in done.rollout.samples)):
            for which, event in events:
                try:
                    getattr(observer, which)(event)
                except Exception as raised:
                    message = f"`{which}` raised {type(raised).__name__}: {raised}"
                    require(False, message)


@check("judge_model")
def levels_rise_in_steps_of_one(subject: Subject) -> None:
    """Ratings and marks lie on them."""
    levels = list(subject.ready().levels)
    require(len(levels) > 1, f"levels are {levels}: at least two are needed")
    require(all(b - a == 1 for a, b in pairwise(levels)), f"levels {levels} do not rise in steps of 1")


@check("judge_model")
def it_learns_from_ratings(subject: Subject) -> None:
    """The loss is a finite scalar, with a gradient to what `load` marks as trained."""
    judge = subject.ready()
    net = judge.load(torch.device("cpu"))
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    require(trained, "no parameter of the network has `requires_grad`")
    ratings = [float(level) for level in judge.levels]
    samples = subject.pictures(of=2, per_prompt=2)
    rated = [Rated(sample=s, ratings=(ratings[i % len(ratings)],)) for i, s in enumerate(samples)]
    loss = judge.loss(net, rated)
    require(loss.value.ndim == 0, f"the loss has shape {list(loss.value.shape)} instead of being a scalar")
    require_finite(loss.value, "the loss")
    loss.value.backward()
    require(any(w.grad is not None and bool(w.grad.any()) for w in trained), "no trained parameter gets a gradient")


@check("judge_model")
def one_mark_per_sample_on_the_levels(subject: Subject) -> None:
    """Between the lowest and the highest level, without gradient."""
    judge = subject.ready()
    samples = subject.pictures(of=2, per_prompt=2)
    marks = judge.mark(judge.load(torch.device("cpu")), samples)
    require(marks.values.shape == (len(samples),), f"marks {list(marks.values.shape)} for {len(samples)} samples")
    require(not marks.values.requires_grad, "marks carry a gradient")
    low, high = min(judge.levels), max(judge.levels)
    inside = bool(((marks.values >= low) & (marks.values <= high)).all())
    require(inside, f"marks {marks.values.tolist()} lie outside the levels {low} to {high}")
