"""Draw the diagrams of the documentation as SVG: python docs/draw_diagrams.py [--check]."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).with_name("images")
WIDTH = 460
INK, PAPER, LINE, FILL, SOFT = "#23272f", "#fbfaf7", "#7d8590", "#ece5d8", "#dbe6e4"
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif" '
    'font-size="14" fill="{ink}"><title>{title}</title>'
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z" fill="{line}"/></marker></defs>'
    '<rect width="{width}" height="{height}" rx="10" fill="{paper}"/>'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle with a title and lines below it."""

    x: int
    y: int
    width: int
    title: str
    lines: Sequence[str] = ()
    fill: str = FILL

    @property
    def height(self) -> int:
        """As its lines need it."""
        return 32 + 18 * len(self.lines)

    @property
    def middle(self) -> int:
        """Its horizontal middle."""
        return self.x + self.width // 2

    def drawn(self) -> Iterator[str]:
        """As SVG."""
        yield (
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6" fill="{self.fill}" '
            f'stroke="{LINE}"/>'
        )
        yield label(self.middle, self.y + 21, self.title, bold=True)
        for number, line in enumerate(self.lines):
            yield label(self.middle, self.y + 39 + 18 * number, line, size=12)


def label(x: int, y: int, text: str, *, size: int = 14, bold: bool = False, anchor: str = "middle") -> str:
    """One line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """A line with a tip."""
    (x, y), (to_x, to_y) = start, end
    return f'<path d="M{x} {y}L{to_x} {to_y}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'


def picture(title: str, height: int, parts: Sequence[str]) -> str:
    """A whole file."""
    head = HEAD.format(width=WIDTH, height=height, title=escape(title), ink=INK, paper=PAPER, line=LINE)
    return "\n".join([head, *parts, "</svg>", ""])


def pipeline() -> str:
    """The stages of the demo's recipe, and what each hands to the next."""
    left, right, wide = 20, 240, 200
    boxes = {
        "curate_t2i": Box(x=left, y=20, width=wide, title="curate_t2i", lines=["which prompts differ", "in quality?"]),
        "curate_edit": Box(x=right, y=20, width=wide, title="curate_edit", lines=["the same", "for edits"]),
        "teacher_t2i": Box(x=left, y=148, width=wide, title="teacher_t2i", lines=["reinforcement learning"]),
        "teacher_edit": Box(x=right, y=148, width=wide, title="teacher_edit", lines=["reinforcement learning"]),
        "student": Box(x=130, y=258, width=wide, title="student", lines=["on-policy distillation"], fill=SOFT),
        "compare": Box(x=left, y=368, width=wide, title="compare", lines=["all of them, paired,", "with intervals"]),
        "export": Box(x=right, y=368, width=wide, title="export", lines=["a folder that needs", "no Velatura"]),
    }
    parts = [line for box in boxes.values() for line in box.drawn()]
    parts += [
        _between(boxes["curate_t2i"], boxes["teacher_t2i"]),
        _between(boxes["curate_edit"], boxes["teacher_edit"]),
    ]
    parts += [_between(boxes[name], boxes["student"]) for name in ("teacher_t2i", "teacher_edit")]
    parts += [_between(boxes["student"], boxes[name]) for name in ("compare", "export")]
    parts += [
        label(230, 122, "prompts that were kept", size=12),
        label(230, 228, "guided velocities", size=12),
        label(230, 346, "its weights", size=12),
    ]
    return picture("The pipeline: curate, two teachers, one student, compare and export", 474, parts)


def _between(above: Box, below: Box) -> str:
    """An arrow down from one box to another, in the middle of what they have above each other."""
    x = (max(above.x, below.x) + min(above.x + above.width, below.x + below.width)) // 2
    return arrow((x, above.y + above.height), (x, below.y - 1))


STEP: Sequence[tuple[str, Sequence[str], str]] = (
    ("task", ("prompts, with their sources",), "Prompt [P]"),
    ("rollout", ("adapter, guidance, kernel:", "K steps of the solver, under the plan of timesteps"),
     "Rollout [B = P G]"),
    ("rewards", ("concurrently; retries; a budget of failures",), "RewardReport [B, R]"),
    ("prompt_filter, advantage", ("how much better than its group?",), "Advantages [B]"),
    ("timesteps", ("re-noised finished samples, or visited states",), "Points [N]"),
    ("adapter, guidance", ("one velocity for each role the objective asks for;", "gradient for CURRENT alone"),
     "velocity by role"),
    ("objective", ("a formula in velocities",), "Loss"),
    ("engine", ("backward, step; OLD follows",), "StepEnd"),
    ("observers", ("hear of it and change nothing",), ""),
)  # fmt: skip
"""What a step goes through: (kind, what happens, what is handed on)."""


def step() -> str:
    """The data flow of one step of reinforcement learning."""
    parts: list[str] = []
    y = 18
    for title, lines, hands_on in STEP:
        box = Box(x=30, y=y, width=400, title=title, lines=lines, fill=SOFT if title == "objective" else FILL)
        parts += box.drawn()
        y += box.height
        if hands_on:
            parts += [arrow((230, y), (230, y + 27)), label(242, y + 18, hands_on, size=12, anchor="start")]
            y += 28
    return picture("One step: from prompts to an update, with what is handed from part to part", y + 18, parts)


DRAWINGS = {"pipeline.svg": pipeline, "step.svg": step}


def main() -> int:
    """Write the files, or say whether they are current."""
    if "--check" in sys.argv[1:]:
        return int(any((IMAGES / name).read_text(encoding="utf-8") != draw() for name, draw in DRAWINGS.items()))
    for name, draw in DRAWINGS.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
