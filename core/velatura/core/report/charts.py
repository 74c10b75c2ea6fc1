"""Small charts as inline SVG. Colours are classes of the style sheet, so that they follow dark mode and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

Point = tuple[float, float]

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
COLOURS = 6
"""Line colours of the style sheet: classes s0 to s5."""
SMOOTH_FROM = 12
"""Shorter series are drawn as they are."""
DENSE = 400
"""Points of a line beyond which neighbours are averaged: no screen shows more."""


def line_chart(series: Mapping[str, Sequence[Point]], *, label: str) -> Markup:
    """Lines over steps: the raw values faint, a moving average strong. Legend included when there are several."""
    drawn = {name: _thin(points) for name, points in series.items() if points}
    if not drawn:
        return Markup("")
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    frame = _Frame(min(xs), max(xs), *_padded(min(ys), max(ys)))
    parts = [frame.axes()]
    for number, (name, points) in enumerate(drawn.items()):
        parts.append(_line(frame, name, points, number % COLOURS))
    return _svg(WIDTH, HEIGHT, "".join(parts), label) + _legend(list(drawn))


def histogram(kept: Sequence[float], dropped: Sequence[float], *, label: str, bins: int = 24) -> Markup:
    """Two stacked histograms over common bins: what was kept stands on the axis, what was dropped on top."""
    everything = [*kept, *dropped]
    if not everything:
        return Markup("")
    edges = np.histogram_bin_edges(everything, bins=bins)
    counts = [np.histogram(values, edges)[0] for values in (kept, dropped)]
    frame = _Frame(float(edges[0]), float(edges[-1]), 0.0, float(max(1, (counts[0] + counts[1]).max())))
    parts = [frame.axes()]
    for i in range(len(edges) - 1):
        x0, x1 = frame.x(float(edges[i])), frame.x(float(edges[i + 1]))
        below = 0.0
        for name, style, count in (("kept", "s0", counts[0][i]), ("dropped", "off", counts[1][i])):
            if count:
                top, foot = frame.y(below + float(count)), frame.y(below)
                tip = f"{edges[i]:.2f} to {edges[i + 1]:.2f}: {count} {name}"
                parts.append(
                    f'<rect class="fill {style}" x="{x0 + 0.5:.1f}" y="{top:.1f}" width="{max(0.5, x1 - x0 - 1):.1f}" '
                    f'height="{foot - top:.1f}"><title>{tip}</title></rect>'
                )
            below += float(count)
    return _svg(WIDTH, HEIGHT, "".join(parts), label)


def interval_glyph(value: float, low: float | None, high: float | None, span: float, tone: str) -> Markup:
    """A difference and its interval on a common scale from -span to +span; the long tick is 0."""
    width, height = 150, 18

    def x(number: float) -> float:
        return width / 2 + max(-1.0, min(1.0, number / span)) * (width / 2 - 6)

    mid = height / 2
    parts = [
        f'<line class="rule" x1="0" x2="{width}" y1="{mid}" y2="{mid}"/>',
        f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="1" y2="{height - 1}"/>',
    ]
    if low is not None and high is not None:
        parts.append(f'<line class="range {tone}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{mid}" y2="{mid}"/>')
    parts.append(f'<circle class="dot {tone}" cx="{x(value):.1f}" cy="{mid}" r="4.2"/>')
    return _svg(width, height, "".join(parts), f"difference {value:+.3f}", css="glyph")


def share_bar(shares: Mapping[str, float], *, label: str) -> Markup:
    """One bar cut in proportion, with its legend: where the time of a step goes."""
    total = sum(shares.values())
    if total <= 0:
        return Markup("")
    parts, x = [], 0.0
    for number, (name, value) in enumerate(shares.items()):
        width = 340 * value / total
        tip = f"{escape(name)}: {value:.2f} s, {value / total:.0%}"
        parts.append(
            f'<rect class="fill s{number % COLOURS}" x="{x:.1f}" y="0" width="{max(0.0, width - 1):.1f}" height="14">'
            f"<title>{tip}</title></rect>"
        )
        x += width
    names = [f"{name} {value:.2f} s" for name, value in shares.items()]
    return _svg(340, 14, "".join(parts), label) + _legend(names, always=True)


class _Frame:
    """Data coordinates to the plot area."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float) -> None:
        self.x0, self.x1, self.y0, self.y1 = x0, x1 if x1 > x0 else x0 + 1, y0, y1

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        """Horizontal rules with their numbers, and numbers along the foot."""
        parts = []
        for tick in nice_ticks(self.y0, self.y1, 4):
            y = self.y(tick)
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
        for tick in nice_ticks(self.x0, self.x1, 5):
            parts.append(f'<text x="{self.x(tick):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{number(tick)}</text>')
        return "".join(parts)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label: short, with a real minus."""
    if value and not 1e-3 <= abs(value) < 1e5:
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    else:
        text = f"{value:.3f}".rstrip("0").rstrip(".")
    return text.replace("-", "\N{MINUS SIGN}") if text != "-0" else "0"


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over `width` values; at the ends over as many as there are on both sides."""
    half = width // 2
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    result = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        result.append(float(total[i + reach + 1] - total[i - reach]) / (2 * reach + 1))
    return result


def _line(frame: _Frame, name: str, points: Sequence[Point], colour: int) -> str:
    """One series: raw, smoothed, and dots where there are few."""
    last = f"<title>{escape(name)}: {points[0][1]:.4g} at first, {points[-1][1]:.4g} at last</title>"
    if len(points) < SMOOTH_FROM:
        dots = "".join(
            f'<circle class="dot s{colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.4"/>' for x, y in points
        )
        return f'<g>{last}<polyline class="line s{colour}" points="{_path(frame, points)}"/>{dots}</g>'
    smooth = moving_average([y for _, y in points], max(5, len(points) // 8))
    strong = [(x, y) for (x, _), y in zip(points, smooth, strict=True)]
    return (
        f'<g>{last}<polyline class="line faint s{colour}" points="{_path(frame, points)}"/>'
        f'<polyline class="line s{colour}" points="{_path(frame, strong)}"/></g>'
    )


def _path(frame: _Frame, points: Sequence[Point]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _thin(points: Sequence[Point]) -> list[Point]:
    stride = math.ceil(len(points) / DENSE)
    if stride <= 1:
        return list(points)
    blocks = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(block[0][0], sum(y for _, y in block) / len(block)) for block in blocks]


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little room above and below; a flat line gets room around it."""
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 1e-6)
    return low - room, high + room


def _legend(names: Sequence[str], *, always: bool = False) -> Markup:
    if len(names) < 2 and not always:
        return Markup("")
    keys = "".join(f'<span><i class="key s{i % COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return Markup(f'<div class="legend">{keys}</div>')


def _svg(width: float, height: float, body: str, label: str, css: str = "chart") -> Markup:
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
