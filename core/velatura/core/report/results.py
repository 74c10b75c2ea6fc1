"""What an evaluation shows: tables, tiles and pictures for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from velatura.core.report.charts import interval_glyph
from velatura.core.report.data import Stage, read_json, read_samples
from velatura.core.report.gallery import Row, balanced, extremes, open_wall
from velatura.core.report.samples import Evaluation
from velatura.core.report.summary import SUMMARY
from velatura.core.report.wording import Sentence, direction, metric_name, percent, probability, sentences, signed

ABOUT = ("primary", "share", "warning")
"""Sentences that stand at the top of the page; the others stand with their route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One model on one metric."""

    model: str
    mean: str
    mean_interval: str
    glyph: Markup
    difference: str
    interval: str
    tone: str
    p: str
    is_significant: bool
    effect: str
    share: str
    missing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricTable:
    """One metric on one route."""

    name: str
    is_reward: bool
    lines: list[Line]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatCell:
    """One model on one category."""

    mean: str
    difference: str
    tone: str
    strength: float
    """0 to 1, relative to the largest difference of the table."""
    is_clear: bool
    """The interval excludes 0."""
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatTable:
    """One metric by category."""

    name: str
    rows: list[tuple[str, int, list[HeatCell]]]
    """Category, its prompts, a cell per model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteResult:
    """Everything about one route."""

    route: str
    n_prompts: int
    seeds: float
    baseline: str
    models: list[str]
    compared: int
    """Comparisons that were corrected together."""
    metrics: list[MetricTable]
    heat: list[HeatTable]
    rest: list[Sentence]
    shown: list[Row]
    best: list[Row]
    worst: list[Row]
    subject: str
    """The model whose best and worst are shown."""
    primary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One evaluate stage."""

    stage: Stage
    sentences: list[Sentence]
    routes: list[RouteResult]
    bootstrap: int


def read_results(stages: Sequence[Stage], notes: list[str]) -> list[Result]:
    """Results of the evaluate stages that have a summary."""
    found = []
    for stage in stages:
        if not (stage.folder / SUMMARY).exists():
            notes.append(f"{stage.name}/{SUMMARY} is missing: the comparison is not finished.")
            continue
        summary = read_json(stage.folder / SUMMARY, notes)
        if not summary.get("routes"):
            continue
        evaluation = read_samples(stage, notes)
        said = sentences(summary)
        routes = [_route(stage, summary, route, evaluation, said, notes) for route in summary["routes"]]
        found.append(Result(
            stage=stage, sentences=[s for s in said if s.subject in ABOUT],
            routes=[route for route in routes if route is not None], bootstrap=summary["bootstrap"],
        ))  # fmt: skip
    return found


def _route(
    stage: Stage, summary: Mapping[str, Any], route: str, evaluation: Evaluation | None, said: Sequence[Sentence],
    notes: list[str],
) -> RouteResult | None:  # fmt: skip
    facts = summary["routes"][route]
    if not facts["headline"]:
        notes.append(f"No metric of {stage.name} applies to route {route}.")
        return None
    primary, baseline = facts["headline"][0], summary["baseline"]
    others = [model for model in facts["models"] if model != baseline]
    subject = next((m for m in others if m in facts["retained"]), others[-1] if others else "")
    wall = open_wall(stage.folder, evaluation, route, primary, notes) if evaluation else None
    can_rank = wall is not None and {subject, baseline} <= set(wall.models)
    best, worst = extremes(wall, subject, baseline) if wall is not None and can_rank else ([], [])
    return RouteResult(
        route=route,
        n_prompts=facts["n_prompts"],
        seeds=facts["seeds_per_prompt"],
        baseline=baseline,
        models=list(facts["models"]),
        compared=len(others) * len(facts["headline"]),
        metrics=_metric_tables(facts),
        heat=[_heat(facts, metric, baseline) for metric in facts["metrics"]],
        rest=[s for s in said if s.subject == "rest" and s.route == route],
        shown=balanced(wall) if wall else [],
        best=best,
        worst=worst,
        subject=subject,
        primary=metric_name(primary),
    )


def _metric_tables(facts: Mapping[str, Any]) -> list[MetricTable]:
    """Headline metrics first, then the rewards, each with a line per model."""
    order = [*facts["headline"], *(name for name in facts["metrics"] if name not in facts["headline"])]
    span = {  # gold metrics share a scale, and rewards, whose units may be others, share another
        family: max((_reach(own[m]["overall"]) for own in facts["models"].values() for m in metrics), default=0) or 1.0
        for family in (True, False)
        for metrics in ([m for m in order if m.startswith("reward/") is family],)
    }
    return [
        MetricTable(
            name=metric_name(metric),
            is_reward=is_reward,
            lines=[_line(facts, model, metric, span[is_reward]) for model in facts["models"]],
        )
        for metric in order
        for is_reward in (metric.startswith("reward/"),)
    ]


def _reach(cell: Mapping[str, Any]) -> float:
    ends = [cell.get(name) for name in ("difference", "low", "high")]
    return max((abs(end) for end in ends if end is not None), default=0.0)


def _line(facts: Mapping[str, Any], model: str, metric: str, span: float) -> Line:
    cell = facts["models"][model][metric]["overall"]
    difference, low, high, p = (cell.get(name) for name in ("difference", "low", "high", "p_holm"))
    tone = direction(cell)
    bounds = "" if low is None else f"{signed(low)} to {signed(high)}"
    return Line(
        model=model,
        mean="n/a" if cell["mean"] is None else f"{cell['mean']:.3f}",
        mean_interval="" if cell["mean_low"] is None else f"{cell['mean_low']:.3f} to {cell['mean_high']:.3f}",
        glyph=Markup("") if difference is None else interval_glyph(difference, low, high, span, tone),
        difference="" if difference is None else signed(difference),
        interval=bounds,
        tone=tone,
        p="" if p is None else probability(p),
        is_significant=p is not None and p < 0.05,
        effect="" if cell.get("effect") is None else f"{signed(cell['effect'], 2)} sd",
        share=_share(facts, model, metric),
        missing=cell["missing"],
    )


def _share(facts: Mapping[str, Any], model: str, metric: str) -> str:
    """`93 % [85 %, 101 %] of teacher_t2i`."""
    kept = facts["retained"].get(model)
    if kept is None:
        return ""
    share = kept["metrics"][metric]
    if not share["is_meaningful"]:
        return f"no share: {kept['teacher']} shows no clear gain"
    return f"{percent(share['ratio'])} [{percent(share['low'])}, {percent(share['high'])}] of {kept['teacher']}'s gain"


def _heat(facts: Mapping[str, Any], metric: str, baseline: str) -> HeatTable:
    """Categories by models, coloured by the difference to the baseline."""
    cells = {
        name: [own[metric]["categories"].get(name) for own in facts["models"].values()] for name in facts["categories"]
    }
    differences = [abs(cell["difference"]) for row in cells.values() for cell in row if cell and cell.get("difference")]
    largest = max(differences, default=0.0) or 1.0
    rows = [
        (name, max((cell["n_prompts"] for cell in row if cell), default=0), [_heat_cell(cell, largest) for cell in row])
        for name, row in cells.items()
    ]
    return HeatTable(name=metric_name(metric), rows=[row for row in rows if row[1]])


def _heat_cell(cell: Mapping[str, Any] | None, largest: float) -> HeatCell:
    if cell is None or cell["mean"] is None:
        return HeatCell(mean="–", difference="", tone="open", strength=0.0, is_clear=False, note="does not apply")  # noqa: RUF001
    difference = cell.get("difference")
    tone = direction(cell)
    note = f"{cell['n_prompts']} prompts"
    if cell.get("low") is not None:
        note += f", difference {signed(cell['low'])} to {signed(cell['high'])}"
    return HeatCell(
        mean=f"{cell['mean']:.2f}",
        difference="" if difference is None else signed(difference, 2),
        tone="good" if (difference or 0) > 0 else "bad",
        strength=round(abs(difference or 0) / largest, 3),
        is_clear=tone != "open",
        note=note,
    )
