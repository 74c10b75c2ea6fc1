"""How a run went: training curves, curation, failures, and what everything was made from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from velatura.core.report.charts import Point, histogram, line_chart, share_bar
from velatura.core.report.data import Run, Stage, read_ledger, read_metrics, read_pictures
from velatura.core.report.gallery import file_uri

STRIP = 4
"""Grids of one film strip."""
BOOKKEEPING = ("lr", "updated", "rows/", "time/", "advantage/")
_NUMBER = re.compile(r"(?<![\w.])\d+(\.\d+)?(e[+-]?\d+)?")
_GRID = re.compile(r"(?P<label>.*?)-?step-(?P<step>\d+)\.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart with its title."""

    title: str
    svg: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One stored picture."""

    uri: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """The same prompts and seeds at several steps."""

    label: str
    figures: list[Figure]
    prompts: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One training stage."""

    stage: Stage
    steps: int
    charts: list[Chart]
    more: list[Chart]
    time: Markup
    step_seconds: float | None
    strips: list[Strip]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curation:
    """One curate stage."""

    stage: Stage
    total: int
    kept: int
    by_category: list[tuple[str, int, int]]
    """Category, kept, dropped."""
    reasons: list[tuple[str, int]]
    histogram: Markup
    figures: list[Figure]


def read_course(stage: Stage, notes: list[str]) -> Course:
    """Curves and pictures of a training stage."""
    series = read_metrics(stage, notes)
    if not series and stage.status != "not run":
        notes.append(f"{stage.name}/metrics.jsonl holds no step yet.")
    step_times = series.get("time/step_s", [])
    logged = max((len(points) for points in series.values()), default=0)
    times = {  # a phase that only some steps have is spread over all of them
        name.removeprefix("time/").removesuffix("_s"): sum(v for _, v in points) / logged
        for name, points in series.items()
        if name.startswith("time/") and name != "time/step_s"
    }
    charts, more = _charts(series)
    return Course(
        stage=stage,
        steps=1 + int(max((points[-1][0] for points in series.values()), default=-1)),
        charts=charts,
        more=more,
        time=share_bar(times, label="mean seconds of a step by phase"),
        step_seconds=sum(v for _, v in step_times) / len(step_times) if step_times else None,
        strips=_strips(read_pictures(stage, notes), notes),
    )


def _charts(series: Mapping[str, list[Point]]) -> tuple[list[Chart], list[Chart]]:
    """The charts everyone looks at, and those for the curious."""

    def matching(pattern: str) -> dict[str, list[Point]]:
        return {m.group(1): points for name, points in series.items() if (m := re.fullmatch(pattern, name))}

    wanted = [
        ("Reward, composite", matching(r"reward/(composite)")),
        ("Rewards, each by itself", matching(r"reward/(.+)/mean")),
        ("Agreement with the ratings, calibration split", matching(r"calibration/(spearman|pairwise|marked)")),
        ("Gold metrics, not used in training", matching(r"gold/(.+?)(?:/mean)?")),
        ("Distance to the teachers on fixed held-out states", matching(r"probe/(.+)")),
        ("Loss", matching(r"(loss)")),
        ("Distance to the reference (KL)", matching(r"(.*\bkl\b.*)")),
        ("Gradient norm", matching(r"(grad_norm)")),
        ("Spread of rewards within a group", matching(r"reward/(spread_within_group)")),
    ]
    shown = {"reward/composite", "loss", "grad_norm", "reward/spread_within_group"}
    rest = {
        name: points
        for name, points in series.items()
        if name not in shown
        and not re.fullmatch(
            r"reward/.+/(mean|failed|golden|(asked|failure_rate)/.+)|gold/.+|probe/.+|calibration/.+|.*\bkl\b.*", name
        )
        and not name.startswith(BOOKKEEPING)
    }
    charts = [Chart(title=title, svg=line_chart(lines, label=title)) for title, lines in wanted if lines]
    return charts, [Chart(title=name, svg=line_chart({name: points}, label=name)) for name, points in rest.items()]


def _strips(pictures: Sequence[tuple[Path, str]], notes: list[str]) -> list[Strip]:
    """Film strips by label; the first, the last, and some between."""
    by_label: dict[str, list[tuple[int, Path, str]]] = {}
    for path, caption in pictures:
        if match := _GRID.fullmatch(path.name):
            by_label.setdefault(match["label"], []).append((int(match["step"]), path, caption))
    strips = []
    for label, grids in by_label.items():
        grids.sort(key=lambda grid: grid[0])
        last = len(grids) - 1
        chosen = sorted({round(i * last / (STRIP - 1)) for i in range(STRIP)})
        figures = [
            Figure(uri=uri, caption=f"step {grids[i][0]}" if grids[i][0] else "before training")
            for i in chosen
            if (uri := file_uri(grids[i][1], notes))
        ]
        prompts = grids[-1][2].partition(": ")[2] or grids[-1][2]
        strips.append(Strip(label=label, figures=figures, prompts=prompts))
    return strips


def read_curation(stage: Stage, notes: list[str]) -> Curation | None:
    """Summary of a curation ledger."""
    rows = read_ledger(stage, notes)
    if not rows:
        return None
    kept = [row for row in rows if row.get("keep")]
    dropped = [row for row in rows if not row.get("keep")]
    seen, stayed = Counter(str(row.get("category")) for row in rows), Counter(str(row.get("category")) for row in kept)
    figures = [
        Figure(uri=uri, caption=caption or path.stem)
        for path, caption in read_pictures(stage, notes)
        if (uri := file_uri(path, notes))
    ]
    return Curation(
        stage=stage,
        total=len(rows),
        kept=len(kept),
        by_category=[(name, stayed[name], seen[name] - stayed[name]) for name in sorted(seen)],
        reasons=_reasons([str(row.get("reason", "")) for row in dropped]),
        histogram=histogram(_ranges(kept), _ranges(dropped), label="range of the composite reward within a group"),
        figures=sorted(figures, key=lambda figure: not figure.caption.startswith("kept")),
    )


def _ranges(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(row["range"]) for row in rows if row.get("range") is not None]


def _reasons(texts: Sequence[str]) -> list[tuple[str, int]]:
    """How often each reason was given; reasons that differ in their numbers only are one."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(_NUMBER.sub("…", text), []).append(text)
    named = [(same[0] if len(set(same)) == 1 else pattern, len(same)) for pattern, same in groups.items()]
    return sorted(named, key=lambda item: -item[1])


def failures(run: Run, missing: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Stage, what, how often: rewards that failed, and pictures without a value for a metric."""
    found = []
    for stage in run.stages:
        counted = stage.result.get("failures")
        if isinstance(counted, int) and counted:
            found.append((stage.name, "reward calls that failed", counted))
        elif isinstance(counted, Mapping):
            found += [(stage.name, str(what), int(count)) for what, count in counted.items() if count]
    return found + [("evaluation", what, count) for what, count in missing.items() if count]


def recipe_text(run: Run) -> str:
    """The resolved recipe as YAML."""
    recipe = run.resolved.get("recipe")
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110) if recipe else ""


def duration(seconds: float | None) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
