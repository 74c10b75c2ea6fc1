"""What judges write down: sheets of scores in words or JSON, and the numbers in them. Pure; nothing is guessed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

THOUGHT = "</think>"
OBJECT = re.compile(r"\{.*\}", re.DOTALL)
LIST = re.compile(r"[\"']?score[\"']?\s*:\s*\[([^\[\]]*)\]", re.IGNORECASE)
NUMBER = r"[+-]?\d+(?:\.\d+)?"
MARKS = {0: 0.0, 1: 60.0, 2: 100.0}
"""Q-Judger's levels, failed, passed and excellent, as its authors count them."""


class NoScores(Exception):
    """The text holds none that count; says why."""


def labelled(text: str, labels: Sequence[str], low: float, high: float) -> list[float]:
    """The last number behind each label, like `Alignment Score (1-5): 3.62`.

    Raises:
        NoScores: one is missing or out of range.
    """
    found = []
    for label in labels:
        numbers = re.findall(
            rf"{label}(?:\s+score)?\W*(?:\(\s*1\s*-\s*5\s*\))?[\s*]*:[\s*]*({NUMBER})", text, re.IGNORECASE
        )
        if not numbers:
            raise NoScores(f"the reply says no {label.lower()} score")
        found.append(within(float(numbers[-1]), low, high))
    return found


def pair(text: str, high: float) -> tuple[float, float]:
    """The two scores of a reply like `{"reasoning": "...", "score": [21, 18]}`, quotes within the reasoning or not.

    Raises:
        NoScores: there are not two numbers in [0, high].
    """
    lists = LIST.findall(answer(text))
    if not lists:
        raise NoScores("the reply holds no list of scores")
    parts = [part.strip() for part in lists[-1].split(",") if part.strip()]
    if len(parts) != 2 or not all(re.fullmatch(NUMBER, part) for part in parts):
        raise NoScores(f"the reply's scores are [{lists[-1].strip()[:60]}], and not two numbers")
    first, second = (within(float(part), 0, high) for part in parts)
    return first, second


def answer(text: str) -> str:
    """What follows the thoughts of a judge that thinks aloud."""
    return text.rpartition(THOUGHT)[2]


def within(value: float, low: float, high: float) -> float:
    """`value`, when it is in [low, high].

    Raises:
        NoScores: it is not.
    """
    if not low <= value <= high:
        raise NoScores(f"the reply's score {value:g} is not within {low:g} to {high:g}")
    return value


def facets(checklist: str) -> dict[str, str]:
    """From each facet of a checklist, `- Noise: ...`, to the heading above it, `## Detail`."""
    heading, found = "", {}
    for line in checklist.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ").strip()
        elif line.startswith("- ") and ":" in line:
            found[line.removeprefix("- ").partition(":")[0].strip()] = heading
    return found


def checked_off(text: str, checklist: str) -> float | None:
    """In [0, 100]: mean over headings of the mean over their facets of 0, 60 or 100; None where nothing applies.

    A facet counts to the heading that the checklist has it under, wherever the judge wrote it, in whatever case.

    Raises:
        NoScores: the reply is no such sheet, marks a facet that the checklist does not have, or leaves one out: a mean
            over part of the checklist is another score.
    """
    match = OBJECT.search(answer(text))
    try:
        sheet = json.loads(match[0]) if match else None
    except ValueError as error:
        raise NoScores(f"the reply is no JSON ({error})") from error
    if not isinstance(sheet, Mapping):
        raise NoScores("the reply holds no JSON object")
    known, headings = {_plain(facet): heading for facet, heading in facets(checklist).items()}, dict[str, list[float]]()
    entries = _entries(sheet)
    _require_all(known, [_plain(facet) for facet, _ in entries])
    for facet, score in entries:
        value = _mark(facet, score)
        if value is not None:
            headings.setdefault(known[_plain(facet)], []).append(value)
    if not headings:
        return None
    return math.fsum(math.fsum(values) / len(values) for values in headings.values()) / len(headings)


def _plain(facet: str) -> str:
    """Its name without case, spaces too many, and marks of bold print."""
    return " ".join(facet.replace("*", " ").casefold().split())


def _require_all(known: Mapping[str, str], marked: Sequence[str]) -> None:
    """See that every facet of the checklist is marked once, and nothing else.

    Raises:
        NoScores: it is not so.
    """
    wrong = {
        "marks what the checklist does not have": [facet for facet in marked if facet not in known],
        "leaves out": [facet for facet in known if facet not in marked],
        "marks twice": sorted({facet for facet in marked if marked.count(facet) > 1}),
    }
    for what, names in wrong.items():
        if names:
            raise NoScores(f"the reply {what}: {', '.join(repr(name[:40]) for name in names[:3])}")


def _entries(sheet: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Facet and score, of a sheet of headings or of facets alone.

    Raises:
        NoScores: it is neither.
    """
    found = []
    for name, inner in sheet.items():
        if not isinstance(inner, Mapping):
            raise NoScores(f"the reply's entry {name!r} is no object")
        if "score" in inner:
            found.append((str(name), inner["score"]))
            continue
        found += [(str(f), s.get("score") if isinstance(s, Mapping) else s) for f, s in inner.items()]
    if not found:
        raise NoScores("the reply's sheet is empty")
    return found


def _mark(facet: str, score: Any) -> float | None:
    """0, 60 or 100; None for N/A.

    Raises:
        NoScores: the score is something else.
    """
    said = str(score).strip().upper()
    if said == "N/A":
        return None
    if isinstance(score, bool) or said not in ("0", "1", "2"):
        raise NoScores(f"the reply marks {facet!r} with {score!r}, which is none of 0, 1, 2 and N/A")
    return MARKS[int(said)]
