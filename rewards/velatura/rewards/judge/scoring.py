"""From the probabilities of the levels to a score. Pure: numbers in, a verdict out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from velatura.api import Scores, Status

NOT_APPLICABLE = "N/A"
"""What stands in place of a level where the rubric has nothing to judge."""
MARKER = "Score: ["
"""What stands before the level. The bracket keeps tokenizers from drawing a space into the token of the level."""
SCORE = re.compile(r"\bscore\W{0,6}?:[\s*\[(\"'`]*(?P<answer>n\s*/\s*a\b|[+-]?\d+(?:[.,]\d+)?)", re.IGNORECASE)
"""A score in a reply, as models write it: `Score: [4]`, `**Score:** 4/5`, `Score: N/A`."""
SIGNS = re.compile(r"[\W\d_]*")
"""What may follow a level at the end of a reply: a bracket, `/5`, stars."""
REFUSALS = re.compile(
    r"\b(?:i(?:'m| am) sorry|i apologi[sz]e|i (?:can(?:no|')t|can not|won't|am (?:not able|unable) to) (?:assist|help|"
    r"judge|rate|evaluate|assess|comply|provide|describe|identify)|as an ai\b)",
    re.IGNORECASE,
)
"""How models say no. Looked for only in replies without a score."""
ROUNDING = 1e-3
"""Log-probabilities and their sum may lie above 0 and 1 by this much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of one picture."""

    status: Status
    value: float = 0.0
    """The score; means nothing where the status is not OK."""
    reason: str = ""
    """Why there is no score."""
    note: str = ""
    """What the judge wrote, for people."""
    mass: float | None = None
    """Probability of all levels together at the place of the score; None where it is not known."""


def failed(reason: str, note: str = "") -> Verdict:
    """No score, and why."""
    return Verdict(status=Status.FAILED, reason=reason, note=note)


def not_applicable(note: str = "") -> Verdict:
    """The judge says that the rubric does not apply."""
    return Verdict(status=Status.NOT_APPLICABLE, reason="the judge answered N/A", note=note)


def expected(levels: Mapping[int, float], *, none: float = -math.inf, min_mass: float = 0.0, note: str = "") -> Verdict:
    """The expectation over the levels, from the log-probabilities of their tokens at the place of the score.

    r = sum_s s p(s) / sum_s p(s): a softmax over the levels alone, its mean in [lowest, highest level]. `levels` maps
    level to log p, -inf where it is not known to be above 0; `none` is log p of "N/A". The sum of p(s) is the mass:
    below `min_mass` the model was about to say something else, and the number would mean nothing.
    """
    values = [*levels.values(), none]
    if any(math.isnan(value) for value in values):
        return failed("the probability of a level is NaN", note)
    if any(value > ROUNDING for value in values):
        return failed(f"a log-probability of {max(values):.3g} is above 0: these are no log-probabilities", note)
    mass = sum(math.exp(value) for value in levels.values())
    if mass > 1 + ROUNDING * len(levels):
        return failed(f"the levels have probability {mass:.3g} together, which is more than 1", note)
    if math.exp(none) > mass:
        return not_applicable(note)
    if mass < min_mass or mass == 0:
        return failed(
            f"the levels have probability {mass:.3g} together, less than min_mass {min_mass:g}: the judge was about to "
            f"write something else",
            note,
        )
    highest = max(levels.values())
    weight = {level: math.exp(value - highest) for level, value in levels.items()}
    total = sum(weight.values())
    value = sum(level * w for level, w in weight.items()) / total
    shares = " ".join(f"{level}:{w / total:.3f}" for level, w in weight.items())
    said = f"{note}\n[score {value:.4f}; {shares}; mass {mass:.4f}]".lstrip()
    return Verdict(status=Status.OK, value=value, note=said, mass=mass)


def written(text: str, levels: Sequence[int], *, is_cut: bool = False) -> Verdict:
    """The last score that a text states, for judges without probabilities. `is_cut`: it ended before its end."""
    found = last_score(text, is_cut=is_cut)
    if found is None:
        return without_score(text, is_cut=is_cut)
    answer = found["answer"]
    if is_not_applicable(answer):
        return not_applicable(text)
    if answer not in {str(level) for level in levels}:
        return failed(f"the judge wrote the score {answer!r}, which is none of {', '.join(map(str, levels))}", text)
    return Verdict(status=Status.OK, value=float(answer), note=text)


def last_score(text: str, *, is_cut: bool = False) -> re.Match[str] | None:
    """The last statement of a score in a text. In one that was cut off only where the text ends with it: within
    reasoning `a score: 3 would mean ...` is not the judge's verdict."""
    found = None
    for match in SCORE.finditer(text):
        found = match
    return None if found is not None and is_cut and not SIGNS.fullmatch(text, found.end()) else found


def is_not_applicable(answer: str) -> bool:
    """Whether an answer in place of a level is N/A."""
    return answer[:1].lower() == "n"


def without_score(text: str, *, is_cut: bool = False) -> Verdict:
    """A reply that states no score is a refusal, a mistake, or too long."""
    if not text.strip():
        return failed("the judge's reply is empty")
    said = " ".join(text.split())
    short = said if len(said) <= 120 else f"{said[:117]}..."
    if REFUSALS.search(text):
        return Verdict(status=Status.REFUSED, reason=f"the judge refused: {short!r}", note=text)
    if is_cut:
        return failed(f"the judge's reply was cut off before its score; raise `reasoning_tokens`: {short!r}", text)
    return failed(f"the judge's reply has no line 'Score: [level]': {short!r}", text)


def mean_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Several verdicts on one picture as one: the mean of those with a score, if they are more than half."""
    scored = [v for v in verdicts if v.status is Status.OK]
    if 2 * len(scored) <= len(verdicts):
        return next(v for v in verdicts if v.status is not Status.OK)
    value = math.fsum(v.value for v in scored) / len(scored)
    note = "\n---\n".join(v.note for v in scored)
    return Verdict(status=Status.OK, value=value, note=f"{note}\n[score {value:.4f}, mean of {len(scored)} replies]")


def as_scores(verdicts: Sequence[Verdict]) -> Scores:
    """[B] verdicts as the framework takes them."""
    return Scores(
        values=torch.tensor([v.value for v in verdicts], dtype=torch.float32),
        status=tuple(v.status for v in verdicts),
        reasons=tuple(v.reason for v in verdicts),
        notes=tuple(v.note for v in verdicts),
    )
