"""Comparisons within a group, over a real socket."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import chat_server as serving
import pytest
import torch
from chat_server import Question, Raw, scored

from velatura.api import Context, Status
from velatura.core.judge import Judge, WeightedReward
from velatura.rewards.judge.pairs import VlmPairs, VlmPairsOptions, ring

Make = Callable[..., Any]
BIAS = 0.3


def brightness(question: Question) -> list[float]:
    return [float(picture.mean() / 255) for picture in question.pictures[-2:]]


def level(x: float) -> Raw:
    """A reply whose expected level is 3 + 2 x, x in [-1, 1]."""
    p = (1 + x) / 2
    return scored({"1": 0.95 * (1 - p) + 1e-9, "5": 0.95 * p + 1e-9})


def biased(question: Question) -> Raw:
    """Prefers the brighter picture, and whatever is shown second."""
    a, b = brightness(question)
    return level(max(-1.0, min(1.0, (b - a) + BIAS * (1 if a != b else 0))))


@pytest.fixture
def pairs(context: Context) -> Make:
    def make(server: Any, **options: Any) -> VlmPairs:
        given = {"rubric": "aesthetics", "model": serving.MODEL, "server": server.address, "retries": 0} | options
        made = VlmPairs(VlmPairsOptions.model_validate(given))
        made.setup(context)
        server.questions.clear()
        return made

    return make


@pytest.mark.parametrize(("count", "opponents"), [(2, 4), (4, 4), (5, 4), (8, 4), (9, 6), (16, 2)])
def test_every_picture_has_as_many_opponents_and_no_pair_comes_twice(count: int, opponents: int) -> None:
    made = ring(count, opponents)
    assert len({frozenset(pair) for pair in made}) == len(made)
    assert all(a != b for a, b in made)
    met = Counter(i for pair in made for i in pair)
    assert set(met.values()) == {min(opponents, count - 1)}


def test_the_score_is_the_share_of_wins_and_a_liking_for_a_place_cancels(
    serve: Make, pairs: Make, pictures: Make
) -> None:
    server = serve(biased)
    values = [0.2, 0.4, 0.6]
    scores = pairs(server).score(pictures(values))
    assert len(server.questions) == 6
    x = [round(v * 255) / 255 for v in values]
    expected = [sum((1 + x[i] - x[j]) / 2 for j in range(3) if j != i) / 2 for i in range(3)]
    torch.testing.assert_close(scores.values, torch.tensor(expected), rtol=0, atol=1e-5)
    assert scores.values.mean() == pytest.approx(0.5, abs=1e-6)


def test_equal_pictures_tie_at_one_half(serve: Make, pairs: Make, pictures: Make) -> None:
    assert pairs(serve(biased)).score(pictures([0.5] * 4)).values.tolist() == pytest.approx([0.5] * 4, abs=1e-6)


def test_a_pair_counts_only_with_both_orders(serve: Make, pairs: Make, pictures: Make) -> None:
    """Order (.2, .4) fails: the other order alone would carry the liking for the second place."""

    def partly(question: Question) -> Raw:
        a, b = brightness(question)
        return Raw(b"", status=400) if a < 0.3 < b < 0.5 else biased(question)

    server = serve(biased)
    asked = pairs(server)
    server.behaviour = partly
    scores = asked.score(pictures([0.2, 0.4, 0.6, 0.8]))
    assert scores.status == (Status.OK,) * 4
    x = [round(v * 255) / 255 for v in (0.2, 0.4, 0.6, 0.8)]
    lost = sum((1 + x[0] - x[j]) / 2 for j in (2, 3)) / 2
    assert scores.values[0] == pytest.approx(max(lost, 0), abs=1e-5)


def test_a_picture_without_half_of_its_pairs_has_no_score(serve: Make, pairs: Make, pictures: Make) -> None:
    server = serve(biased)
    asked = pairs(server)
    server.behaviour = lambda q: Raw(b"gone", status=400) if max(brightness(q)) > 0.9 else biased(q)
    scores = asked.score(pictures([0.2, 0.4, 0.6, 1.0]))
    assert scores.status == (Status.OK, Status.OK, Status.OK, Status.FAILED)
    assert "status 400: gone" in scores.reasons[3]


def test_a_picture_that_is_none_spoils_no_other(serve: Make, pairs: Make, pictures: Make) -> None:
    scores = pairs(serve(biased)).score(pictures([0.2, math.nan, 0.6, 0.8]))
    assert [s is Status.OK for s in scores.status] == [True, False, True, True]


def test_groups_are_compared_one_by_one(serve: Make, pairs: Make, pictures: Make) -> None:
    server = serve(biased)
    reward = WeightedReward(label="pairs", at="rewards.0", model=pairs(server))
    samples = pictures([0.2, 0.8]) + [type(s)(prompt=s.prompt, image=s.image, seed=9, group=1) for s in pictures([0.9])]
    with Judge([reward], max_failed=1) as judging:
        judging.submit(samples)
        report = judging.report([samples[0].prompt, samples[2].prompt])
    assert report.status.flatten().tolist() == [Status.OK, Status.OK, Status.NOT_APPLICABLE]
    assert len(server.questions) == 2
    kinds = [part["type"] for part in server.questions[0].parts]
    assert kinds == ["text", "text", "image_url", "text", "image_url", "text"]
    assert "Picture A is clearly better" in server.questions[0].parts[0]["text"]
