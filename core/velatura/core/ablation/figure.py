"""The figure of an ablation: what each arm gained over the base, by metric, with every seed shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape

from velatura.core.ablation.results import Findings
from velatura.core.crossed import Crossed
from velatura.core.report.charts import nice_ticks, number

LABEL, PANEL, GAP, ROW, HEAD, FOOT = 130, 210, 26, 24, 58, 30
"""Pixels: width of the arms' names, of a panel, between panels; height of an arm, of the title, of the numbers."""
COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5f", "#8a5aa8", "#b8860b", "#4a8c94")
INK, FAINT = "#222", "#bbb"
STYLE = "font-family: system-ui, sans-serif; font-size: 12px"


def figure(findings: Findings) -> str:
    """A standalone SVG on white: one panel for each metric and route, one row for each arm."""
    panels = [
        (f"{metric} · {route}" if len(findings.gains) > 1 else metric, arms)
        for route, metrics in findings.gains.items()
        for metric, arms in metrics.items()
    ]
    arms = list(findings.ablation.arms)
    width = LABEL + max(1, len(panels)) * (PANEL + GAP)
    height = HEAD + len(arms) * ROW + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(findings.ablation.question)}" style="{STYLE}">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(8, 18, findings.ablation.question, size=14, weight="600"),
    ]
    for row, arm in enumerate(arms):
        parts.append(_text(LABEL - 10, HEAD + row * ROW + ROW / 2 + 4, arm, anchor="end"))
    for column, (title, found) in enumerate(panels):
        parts += _panel(LABEL + column * (PANEL + GAP), title, found, arms)
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: float, title: str, found: Mapping[str, Crossed], arms: list[str]) -> list[str]:
    """Differences to the base on one metric; the dark line is no difference."""
    ends = [0.0]
    for d in found.values():
        ends += [value for value in (d.value, d.low, d.high, *d.by_seed) if math.isfinite(value)]
    low, high = min(ends), max(ends)
    room = 0.08 * (high - low) or 0.01
    low, high = low - room, high + room

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * PANEL

    foot = HEAD + len(arms) * ROW
    parts = [_text(left, HEAD - 12, f"{title}, minus base", weight="600")]
    for tick in nice_ticks(low, high, 4):
        colour = INK if tick == 0 else "#e4e4e4"
        parts.append(f'<path d="M{x(tick):.1f} {HEAD}V{foot}" stroke="{colour}" fill="none"/>')
        parts.append(_text(x(tick), foot + 16, number(tick), anchor="middle", size=10))
    for row, arm in enumerate(arms):
        if arm in found:
            parts.append(_arm(found[arm], x, HEAD + row * ROW + ROW / 2, COLOURS[row % len(COLOURS)]))
    return parts


def _arm(d: Crossed, place: Callable[[float], float], y: float, colour: str) -> str:
    """Seeds faint, the mean strong, the interval a line."""
    dots = "".join(f'<circle cx="{place(v):.1f}" cy="{y:.1f}" r="2.6" fill="{FAINT}"/>' for v in d.by_seed)
    line = ""
    if math.isfinite(d.low) and math.isfinite(d.high):
        line = f'<path d="M{place(d.low):.1f} {y:.1f}H{place(d.high):.1f}" stroke="{colour}" stroke-width="2"/>'
    told = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    mean = f'<circle cx="{place(d.value):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    return f"<g><title>{told}</title>{line}{dots}{mean}</g>"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{INK}">{escape(text)}</text>'
    )
