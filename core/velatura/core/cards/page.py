"""`card.html`: one file, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from velatura.core.cards.criteria import failures
from velatura.core.cards.terminal import agreement_rows, shown
from velatura.core.report.charts import interval_glyph

TONE = {"passed": "good", "failed": "bad", "hole": "bad", "right": "good"}
SIDE = 260
"""Of the reliability diagram, in pixels."""
LEFT, FOOT, EDGE = 44, 34, 10


def page(card: Mapping[str, Any]) -> str:
    """The whole page."""
    folders = [Path(__file__).parent, Path(__file__).parents[1] / "report"]
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    measures = card["measures"]
    battery = measures["battery"]
    span = max([0.5, *(abs(row["change"]["value"] or 0) for row in battery)])
    return environment.get_template("card.html.j2").render(
        card=card,
        unmet=list(failures(card["criteria"])),
        rows=agreement_rows(measures),
        diagram=_reliability(measures["calibration"].get("bins", [])),
        slices=[(row, shown(row["half"]), _bar(row["half"])) for row in measures["slices"]],
        battery=[(row, shown(row["change"], 2), _glyph(row, min(span, 3.0))) for row in battery],
        tone=lambda word: TONE.get(word, "open"),
        cost=measures["cost"],
    )


def _glyph(row: Mapping[str, Any], span: float) -> Markup:
    change = row["change"]
    if change["value"] is None:
        return Markup("")
    tone = TONE.get(row["verdict"], "open")
    low, high = change["low"], change["high"]
    return interval_glyph(change["value"], low, high, span, tone)


def _bar(half: Mapping[str, Any]) -> Markup:
    """Accuracy about one half."""
    if half["value"] is None:
        return Markup("")
    low, high = (None if half[end] is None else half[end] - 0.5 for end in ("low", "high"))
    tone = "open" if low is None or high is None else "good" if low > 0 else "bad" if high < 0 else "open"
    return interval_glyph(half["value"] - 0.5, low, high, 0.5, tone)


def _reliability(bins: Sequence[Mapping[str, float]]) -> Markup:
    """Confidence against agreement, both from 1/2 to 1; a dot's area is its share of the pairs."""
    if not bins:
        return Markup("")
    total = sum(each["n"] for each in bins)
    ticks = "".join(
        f'<line class="rule" x1="{LEFT}" x2="{SIDE - EDGE}" y1="{_y(t):.1f}" y2="{_y(t):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{_y(t) + 3.5:.1f}" text-anchor="end">{t:g}</text>'
        f'<text x="{_x(t):.1f}" y="{SIDE - FOOT + 16}" text-anchor="middle">{t:g}</text>'
        for t in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    )
    diagonal = f'<line class="zero" x1="{_x(0.5)}" y1="{_y(0.5)}" x2="{_x(1)}" y2="{_y(1)}"/>'
    dots = "".join(
        f'<circle class="dot s0" cx="{_x(each["confidence"]):.1f}" cy="{_y(each["agreement"]):.1f}" '
        f'r="{3 + 9 * (each["n"] / total) ** 0.5:.1f}" opacity=".75"><title>{each["n"]:.0f} pairs: confidence '
        f"{each['confidence']:.2f}, agreement {each['agreement']:.2f}</title></circle>"
        for each in bins
    )
    label = escape("how sure the reward is, against how many raters agree")
    foot = f'<text x="{(LEFT + SIDE - EDGE) / 2}" y="{SIDE - 2}" text-anchor="middle">confidence of the reward</text>'
    return Markup(
        f'<svg class="chart" viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{label}">{ticks}{diagonal}{dots}{foot}'
        f"</svg>"
    )


def _x(value: float) -> float:
    return LEFT + (value - 0.5) / 0.5 * (SIDE - LEFT - EDGE)


def _y(value: float) -> float:
    """Agreement below one half lies on the foot."""
    return SIDE - FOOT - (max(0.5, value) - 0.5) / 0.5 * (SIDE - FOOT - EDGE)
