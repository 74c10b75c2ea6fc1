"""The reward `vlm-pairs`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar, Literal

from loguru import logger
from pydantic import Field, field_validator

from velatura.api import Context, Prompt, RewardModel, Sample, Scores, Status, Usage
from velatura.rewards.judge.backend import (
    Backend,
    dimension_of,
    grey_sample,
    identity_of,
    judge_fingerprint,
    opened,
    rubric_of,
)
from velatura.rewards.judge.options import OPERATIONAL, VlmJudgeOptions
from velatura.rewards.judge.rubric import PAIR_LEVELS, Rubric
from velatura.rewards.judge.scoring import Verdict, as_scores

Pair = tuple[int, int]


class VlmPairsOptions(VlmJudgeOptions):
    """Options of `vlm-judge`, and how much is compared."""

    opponents: int = Field(
        4,
        ge=2,
        multiple_of=2,
        description="With how many others of its group each picture is compared, in both orders; a group that is not "
        "larger is compared completely.",
    )

    @field_validator("path")
    @classmethod
    def _compares(cls, path: str | None) -> str | None:
        if path is not None:
            raise ValueError(
                "a judge from a judge-fit stage has learnt to mark pictures, not to compare: use vlm-judge"
            )
        return path


class VlmPairs(RewardModel[VlmPairsOptions]):
    """A vision-language model compares pictures of one prompt; the score is the share of comparisons that one wins.

    r_i = mean_j [(1 - q(i, j)) + q(j, i)] / 2, in [0, 1], q(a, b) = (expected level - 1) / 4 when a is shown first, on
    levels from "the first is clearly better" to "the second is clearly better": .5 is a tie and stays one. Both orders
    are asked, so a judge that prefers a place gives everybody .5 more and .5 less. j runs over the neighbours of i in a
    ring. The mean over a group is 1/2 whatever its pictures are: this ranks within a group and measures no progress.

    A pair counts when both orders have a score; a picture needs more than half of its pairs.
    """

    name = "vlm-pairs"
    scope: ClassVar[Literal["sample", "group"]] = "group"
    cached = True
    operational = OPERATIONAL
    _backend: Backend

    def setup(self, context: Context) -> None:
        """Read the rubric; load the model, or ask the server a first question."""
        self.rubric = rubric_of(self.options, context).for_pairs()
        grey = grey_sample(self.rubric)
        first = self.rubric.comparison(grey, grey, self.options.reasoning_tokens)
        self._backend = opened(self.options, self.rubric, context, first)

    def fingerprint(self, context: Context) -> str:
        """Changes with the rubric, the model's folder, and all options but the operational ones."""
        return judge_fingerprint(self, context)

    @cached_property
    def rubric(self) -> Rubric:
        """What the judge goes by; one of the user's own is read by `setup`."""
        return rubric_of(self.options).for_pairs()

    def applies(self, prompt: Prompt) -> bool:
        """Edits for rubrics of edits, other prompts for the others."""
        return self.rubric.applies(prompt)

    def needs_card(self) -> bool:
        """An opinion."""
        return True

    def dimension(self) -> str:
        """What the rubric judges."""
        return dimension_of(self.options)

    def identity(self) -> Mapping[str, str]:
        """A shipped rubric's content; that of a file is known by its name among the options."""
        return identity_of(self.options)

    def usage(self) -> Usage | None:
        """Tokens of all requests so far, or of all forwards."""
        return self._backend.usage

    def prefer(self, pairs: Sequence[tuple[Sample, Sample]]) -> Scores:
        """[N] 1 - q of each pair in the one order given: how much the picture shown first is better, in [0, 1]."""
        tokens = self.options.reasoning_tokens
        verdicts = self._backend.verdicts([self.rubric.comparison(a, b, tokens) for a, b in pairs])
        return as_scores([
            replace(v, value=1 - second_wins(v)) if v.status is Status.OK else v for v in verdicts
        ])  # fmt: skip

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[G] in [0, 1] for the samples of one prompt."""
        if len(samples) < 2:
            return Scores.missing(len(samples), Status.NOT_APPLICABLE, "there is nothing to compare with")
        pairs = ring(len(samples), self.options.opponents)
        orders = [*pairs, *((b, a) for a, b in pairs)]
        tokens = self.options.reasoning_tokens
        verdicts = self._backend.verdicts([self.rubric.comparison(samples[a], samples[b], tokens) for a, b in orders])
        said = dict(zip(orders, verdicts, strict=True))
        self._look_at_orders(pairs, said)
        return as_scores([_standing(i, pairs, said) for i in range(len(samples))])

    def _look_at_orders(self, pairs: Sequence[Pair], said: Mapping[Pair, Verdict]) -> None:
        """How much the place of a picture weighs."""
        gaps = [second_wins(said[a, b]) + second_wins(said[b, a]) - 1 for a, b in pairs if _is_valid((a, b), said)]
        if gaps:
            logger.debug("judge '{}': the second place is worth {:+.3f}", self.rubric.name, math.fsum(gaps) / len(gaps))


def ring(count: int, opponents: int) -> list[Pair]:
    """Pairs in which each of `count` pictures has `opponents` others, its neighbours on a ring; all pairs if fewer."""
    if opponents >= count - 1:
        return [(a, b) for a in range(count) for b in range(a + 1, count)]
    return [(i, (i + step) % count) for step in range(1, opponents // 2 + 1) for i in range(count)]


def second_wins(verdict: Verdict) -> float:
    """How much the picture shown second is better, in [0, 1]."""
    lowest, highest = min(PAIR_LEVELS), max(PAIR_LEVELS)
    return (verdict.value - lowest) / (highest - lowest)


def _standing(i: int, pairs: Sequence[Pair], said: Mapping[Pair, Verdict]) -> Verdict:
    """What the comparisons say of picture i."""
    own = [pair for pair in pairs if i in pair]
    valid = [pair for pair in own if _is_valid(pair, said)]
    if 2 * len(valid) <= len(own):
        return next(v for a, b in own for v in (said[a, b], said[b, a]) if v.status is not Status.OK)
    wins, notes = [], []
    for a, b in valid:
        other = b if i == a else a
        wins.append((1 - second_wins(said[i, other]) + second_wins(said[other, i])) / 2)
        notes += [f"A, with picture {other}: {said[i, other].note}", f"B, with picture {other}: {said[other, i].note}"]
    return Verdict(status=Status.OK, value=math.fsum(wins) / len(wins), note="\n".join(notes))


def _is_valid(pair: Pair, said: Mapping[Pair, Verdict]) -> bool:
    a, b = pair
    return said[a, b].status is Status.OK and said[b, a].status is Status.OK
