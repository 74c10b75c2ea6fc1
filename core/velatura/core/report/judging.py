"""Judges that were fitted in the run, and what became of the truth while a policy was trained on what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from velatura.core.agreement import Agreement, agreement
from velatura.core.report.data import Stage, read_json, read_samples
from velatura.core.report.samples import Evaluation, Measured
from velatura.core.report.summary import SUMMARY
from velatura.core.report.wording import metric_name, signed

VALIDATION = "validation.json"
ROWS = {
    "judge_and_ratings": "judge and mean rating",
    "judge_and_truth": "judge and truth",
    "one_rater_and_truth": "one rater and truth",
    "mean_rating_and_truth": "mean rating and truth",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Agreement of two sides."""

    what: str
    pairwise: str
    spearman: str
    pairs: int
    pictures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """One judge-fit stage."""

    stage: Stage
    dimension: str
    lines: list[Line]
    ceiling: str
    """How it compares with a rater who is left out; empty with one rater."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """A reward of an evaluation beside a gold metric."""

    stage: str
    route: str
    reward: str
    gold: str
    agreement: list[tuple[str, str, str]]
    """Model; agreement of reward and gold within prompts; change of both against the baseline."""


def read_fitted(stages: Sequence[Stage], notes: list[str]) -> list[Fitted]:
    """The judges of a run with their figures on the test split."""
    found = []
    for stage in stages:
        if (stage.folder / VALIDATION).exists():
            facts = read_json(stage.folder / VALIDATION, notes)
            found.append(_fitted(stage, facts))
        elif stage.status == "finished":
            notes.append(f"{stage.name}/{VALIDATION} is missing, so nothing can be said of this judge.")
    return found


def _fitted(stage: Stage, facts: Mapping[str, Any]) -> Fitted:
    figures = facts.get("figures", {})
    lines = [
        Line(
            what=words, pairwise=_with_interval(figures[name], "pairwise"),
            spearman=_with_interval(figures[name], "spearman"), pairs=figures[name]["pairs"],
            pictures=figures[name]["pictures"],
        )
        for name, words in ROWS.items()
        if name in figures
    ]  # fmt: skip
    own = figures.get("leave_one_rater_out") or {}
    said = ""
    if {"judge_pairwise", "rater_pairwise"} <= set(own):
        said = (
            f"With the mean of the other raters, the judge agrees on {own['judge_pairwise']:.1%} of the pairs, the "
            f"rater who is left out on {own['rater_pairwise']:.1%}."
        )
    return Fitted(stage=stage, dimension=str(facts.get("dimension", "")), lines=lines, ceiling=said)


def read_proxies(stages: Sequence[Stage], notes: list[str]) -> list[Proxy]:
    """Every reward of every evaluation beside every gold metric."""
    found = []
    for stage in stages:
        evaluation = read_samples(stage, notes)
        if evaluation is None or not (stage.folder / SUMMARY).exists():
            continue
        summary = read_json(stage.folder / SUMMARY, notes)
        for route, facts in summary.get("routes", {}).items():
            found += _proxies(stage, route, facts, evaluation, summary["baseline"])
    return found


def _proxies(stage: Stage, route: str, facts: Mapping[str, Any], evaluation: Evaluation, baseline: str) -> list[Proxy]:
    rewards = [name for name in facts["metrics"] if name.startswith("reward/")]
    golds = [name for name in facts["metrics"] if name.startswith("gold/")]
    made = []
    for reward in rewards:
        for gold in golds:
            rows = [
                (model, _percent(_within(measured, reward, gold)), _changes(facts, model, reward, gold, baseline))
                for model, measured in evaluation.routes[route].items()
            ]
            if any(said != "–" for _, said, _ in rows):  # noqa: RUF001
                made.append(Proxy(stage=stage.name, route=route, reward=metric_name(reward), gold=metric_name(gold),
                                  agreement=rows))  # fmt: skip
    return made


def _within(measured: Measured, reward: str, gold: str) -> Agreement | None:
    """Whether the reward puts the pictures of a prompt in the order of the gold metric."""
    a, b = measured.metrics[reward], measured.metrics[gold]
    both = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
    if not len(both):
        return None
    prompts = [measured.prompt_ids[row] for row in both]
    units = [measured.units[row] for row in both]
    return agreement(a[both], b[both], prompts, units, bootstrap=1000, seed=0)


def _percent(found: Agreement | None) -> str:
    if found is None or found.pairwise is None:
        return "–"  # noqa: RUF001
    ends = "" if found.pairwise_interval is None else " [{:.1%}, {:.1%}]".format(*found.pairwise_interval)
    return f"{found.pairwise:.1%}{ends} of {found.pairs} pairs"


def _changes(facts: Mapping[str, Any], model: str, reward: str, gold: str, baseline: str) -> str:
    """`reward +0.31 [+0.20, +0.42], alignment -0.02 [-0.04, +0.00]`."""
    if model == baseline:
        return "baseline"
    return ", ".join(
        f"{metric_name(name)} {_change(facts['models'][model][name]['overall'])}" for name in (reward, gold)
    )


def _change(cell: Mapping[str, Any]) -> str:
    if cell.get("difference") is None:
        return "not measured"
    ends = "" if cell.get("low") is None else f" [{signed(cell['low'])}, {signed(cell['high'])}]"
    return f"{signed(cell['difference'])}{ends}"


def _with_interval(found: Mapping[str, Any], name: str) -> str:
    if found.get(name) is None:
        return "–"  # noqa: RUF001
    ends = found.get(f"{name}_interval")
    return f"{found[name]:.3f}" + ("" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]")
