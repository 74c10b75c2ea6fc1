"""The closing summary in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from velatura.core.report.wording import NO_BREAK, direction, metric_name, percent, sentences, signed

WIDE = 4
"""Metrics a table of 100 columns has room for; the others are in the report."""


def summary_table(summary: Mapping[str, Any]) -> Group:
    """One table per route, models by metrics, and what follows from them; at most 100 columns wide."""
    parts: list[RenderableType] = []
    for route, facts in summary["routes"].items():
        if facts["headline"]:
            parts.append(_route_table(route, facts, summary["baseline"]))
    said = Table.grid(padding=(0, 1))
    for sentence in sentences(summary):
        if sentence.subject != "rest":  # the table shows it
            said.add_row(Text("●", style=_STYLE[sentence.tone]), Text(sentence.text.replace(NO_BREAK, " ")))
    parts += [said, Text("")]
    return Group(*parts)


_STYLE = {"good": "green", "bad": "red", "open": "yellow"}


def _route_table(route: str, facts: Mapping[str, Any], baseline: str) -> Table:
    metrics = facts["headline"][:WIDE]
    title = f"{route} · {facts['n_prompts']} prompts x {facts['seeds_per_prompt']:g} seeds"
    caption = f"mean, difference to {baseline}, 95 % interval over prompts; * p < 0.05 after Holm correction"
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", pad_edge=False, box=SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("model", no_wrap=True, max_width=14)
    for metric in metrics:
        table.add_column(metric_name(metric), justify="right", no_wrap=True, max_width=17)
    for model, own in facts["models"].items():
        share = facts["retained"].get(model)
        row = [_cell(own[metric]["overall"], share and share["metrics"][metric]) for metric in metrics]
        table.add_row(model, *row)
    return table


def _cell(cell: Mapping[str, Any], share: Mapping[str, Any] | None) -> Text:
    """Up to three lines: mean and difference, interval, share of the teacher's gain."""
    if cell["mean"] is None:
        return Text("n/a", style="dim")
    difference, low, high = (cell.get(name) for name in ("difference", "low", "high"))
    if difference is None:
        return Text(f"{cell['mean']:.3f}")
    style = {"good": "green", "bad": "red", "open": ""}[direction(cell)]
    star = "*" if (cell["p_holm"] or 1) < 0.05 else " "
    text = Text(f"{cell['mean']:.3f} ").append(f"{signed(difference)}{star}", style=style)
    if low is not None and high is not None:
        text.append(f"\n[{signed(low)}, {signed(high)}]", style="dim")
    if share and share["is_meaningful"]:
        text.append(f"\n{percent(share['ratio'])} of teacher", style="dim")
    return text
