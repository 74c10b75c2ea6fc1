"""What the runs of an ablation say: differences between arms with intervals over seeds and prompts, and a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from velatura.core.ablation.jobs import Job
from velatura.core.ablation.settings import Ablation, Expectation
from velatura.core.crossed import Crossed, Floats, crossed_mean
from velatura.core.errors import VelaturaError, suggest
from velatura.core.graph import BASE
from velatura.core.report.samples import Evaluation, Measured, pair, read_evaluation

HOLDS, FAILS, OPEN = "shown", "opposite", "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """One prediction and what was found."""

    expectation: Expectation
    route: str
    difference: Crossed
    """`more` minus `than`, prompt by prompt and seed by seed, on the same prompts and noises."""

    @property
    def outcome(self) -> str:
        """`shown`: the interval is above 0; `opposite`: below; `open`: 0 is in it, or there is none."""
        if math.isfinite(self.difference.low) and self.difference.low > 0:
            return HOLDS
        return FAILS if math.isfinite(self.difference.high) and self.difference.high < 0 else OPEN

    def sentence(self) -> str:
        """In words."""
        e, d = self.expectation, self.difference
        where = f" ({e.category})" if e.category else ""
        seeds = len(d.by_seed)
        agree = sum(1 for value in d.by_seed if (value > 0) == (d.value > 0))
        interval = f"[{d.low:+.3f}, {d.high:+.3f}]" if math.isfinite(d.low) else "[no interval: one seed]"
        return (
            f"{e.metric}{where}: {e.more} minus {e.than} {d.value:+.3f} {interval}, "
            f"{agree} of {seeds} seeds on this side, {d.n_prompts} prompts: {self.outcome}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything that an ablation found."""

    ablation: Ablation
    name: str
    gains: Mapping[str, Mapping[str, Mapping[str, Crossed]]]
    """Route -> metric -> arm -> difference to the base."""
    tested: Sequence[Tested]

    @property
    def verdict(self) -> str:
        """`reproduced`, `not reproduced` or `not testable here`."""
        if self.ablation.not_testable:
            return "not testable here"
        return "reproduced" if all(test.outcome == HOLDS for test in self.tested) else "not reproduced"

    def sentence(self) -> str:
        """The verdict with its evidence."""
        reason = f" {self.ablation.not_testable.rstrip('.')}." if self.ablation.not_testable else ""
        return f"{self.verdict.capitalize()}.{reason} " + "; ".join(test.sentence() for test in self.tested) + "."

    def as_data(self) -> dict[str, Any]:
        """Plain data; what is not a number is null."""
        facts: dict[str, Any] = _plain(
            {
                "name": self.name,
                "question": self.ablation.question,
                "claim": self.ablation.claim,
                "source": self.ablation.source,
                "seeds": list(self.ablation.seeds),
                "verdict": self.verdict,
                "sentence": self.sentence(),
                "tested": [
                    {**t.expectation.model_dump(), "route": t.route, "outcome": t.outcome, **asdict(t.difference)}
                    for t in self.tested
                ],
                "gains": {
                    route: {metric: {arm: asdict(d) for arm, d in arms.items()} for metric, arms in metrics.items()}
                    for route, metrics in self.gains.items()
                },
            }
        )
        return facts


def find(name: str, ablation: Ablation, jobs: Mapping[tuple[str, int], Job]) -> Findings:
    """Read the evaluations of all runs.

    Raises:
        VelaturaError: a run has none, or a metric or route is unknown.
    """
    tables = {key: read_evaluation(job.folder / ablation.evaluation) for key, job in jobs.items()}
    reader = _Reader(ablation, tables)
    routes = next(iter(tables.values())).routes
    gains = {
        route: {
            metric: found
            for metric in ablation.metrics
            if (found := {arm: d for arm in ablation.arms if (d := reader.maybe(metric, route, arm, BASE))})
        }
        for route in routes
    }
    tested = []
    for expectation in ablation.expect:
        route = expectation.route or _only(list(routes), expectation)
        difference = reader.difference(expectation, route)
        tested.append(Tested(expectation=expectation, route=route, difference=difference))
    return Findings(ablation=ablation, name=name, gains=gains, tested=tested)


def _only(routes: Sequence[str], expectation: Expectation) -> str:
    if len(routes) > 1:
        raise VelaturaError(
            f"the evaluation has the routes {', '.join(routes)}; say with 'route' which one the expectation "
            f"about {expectation.metric} means."
        )
    return routes[0]


class _Reader:
    """Differences out of the tables of all runs."""

    def __init__(self, ablation: Ablation, tables: Mapping[tuple[str, int], Evaluation]) -> None:
        self.ablation, self.tables = ablation, tables

    def difference(self, e: Expectation, route: str) -> Crossed:
        """What an expectation is about."""
        found = self.maybe(e.metric, route, e.more, e.than, e.category)
        if found is None:
            table = next(iter(self.tables.values()))
            if route not in table.routes:
                raise VelaturaError(f"the evaluation has no route '{route}'.{suggest(route, list(table.routes))}")
            known = table.metrics(route)
            raise VelaturaError(
                f"nothing to compare {e.more} and {e.than} by: no prompt of route '{route}'"
                f"{f' and category {e.category!r}' if e.category else ''} has {e.metric} in both."
                f"{'' if e.metric in known else suggest(e.metric, known)}"
            )
        return found

    def maybe(self, metric: str, route: str, more: str, than: str, category: str | None = None) -> Crossed | None:
        """The difference of two arms; None where no prompt has the metric in both."""
        rows: list[dict[str, float]] = []
        for seed in self.ablation.seeds:
            a, b = self._measured(more, seed, route, than), self._measured(than, seed, route, more)
            if a is None or b is None or metric not in a.metrics or metric not in b.metrics:
                return None
            rows.append(_differences(a, b, metric, category))
        units = [unit for unit in rows[0] if all(unit in row for row in rows)]
        if not units:
            return None
        return crossed_mean(np.array([[row[unit] for unit in units] for row in rows]))

    def _measured(self, arm: str, seed: int, route: str, other: str) -> Measured | None:
        """An arm's model on a route; the base as it was measured beside the `other` arm."""
        table = self.tables[other if arm == BASE else arm, seed]
        return table.routes.get(route, {}).get(self.ablation.model_of(arm))


def _differences(a: Measured, b: Measured, metric: str, category: str | None) -> dict[str, float]:
    """Prompt -> mean difference over its pictures that both models drew from the same noise."""
    mine, theirs = pair(a, b)
    difference: Floats = a.metrics[metric][mine] - b.metrics[metric][theirs]
    found: dict[str, list[float]] = {}
    for row, value in zip(mine.tolist(), difference.tolist(), strict=True):
        if math.isfinite(value) and category in (None, a.categories[row]):
            found.setdefault(a.units[row], []).append(value)
    return {unit: sum(values) / len(values) for unit, values in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def save(findings: Findings, folder: Path) -> Path:
    """`results.json`, `figure.svg` and `verdict.md` in `folder`; returns the last."""
    from velatura.core.ablation.figure import figure
    from velatura.core.checkpoint import write_text_atomic

    write_text_atomic(folder / "results.json", json.dumps(findings.as_data(), indent=1, ensure_ascii=False) + "\n")
    write_text_atomic(folder / "figure.svg", figure(findings))
    write_text_atomic(folder / "verdict.md", verdict_text(findings))
    return folder / "verdict.md"


def verdict_text(findings: Findings) -> str:
    """The page of one ablation."""
    a = findings.ablation
    lines = [f"# {a.question}", "", f"Claim: {a.claim} ({a.source})", "", f"**{findings.verdict.capitalize()}.**", ""]
    lines += [f"- {test.sentence()}" for test in findings.tested]
    lines += ["", "![Differences to the base](figure.svg)", ""]
    return "\n".join(lines)
