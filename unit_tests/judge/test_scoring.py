"""From probabilities and words to a verdict, without any model."""

from __future__ import annotations

import math

import pytest

from velatura.api import Status
from velatura.rewards.judge.scoring import Verdict, expected, failed, mean_of, written

LEVELS = (1, 2, 3, 4, 5)


def logs(*p: float) -> dict[int, float]:
    return {level: math.log(value) if value else -math.inf for level, value in zip(LEVELS, p, strict=True)}


@pytest.mark.parametrize(
    ("p", "score"),
    [
        ((0.2, 0.2, 0.2, 0.2, 0.2), 3.0),
        ((0.0, 0.0, 0.0, 0.0, 1.0), 5.0),
        ((0.1, 0.0, 0.0, 0.0, 0.3), 4.0),  # (1 * .1 + 5 * .3) / .4
        ((0.5, 0.25, 0.0, 0.0, 0.0), 4 / 3),
    ],
)
def test_the_score_is_the_mean_level_under_the_levels_alone(p: tuple[float, ...], score: float) -> None:
    verdict = expected(logs(*p))
    assert verdict.status is Status.OK
    assert verdict.value == pytest.approx(score, abs=1e-12)
    assert verdict.mass == pytest.approx(sum(p), abs=1e-12)


def test_the_score_does_not_depend_on_what_the_other_tokens_get() -> None:
    """A softmax over five tokens: adding a constant to their logits changes the mass alone."""
    near, far = logs(0.1, 0.2, 0.3, 0.3, 0.1), logs(1e-40, 2e-40, 3e-40, 3e-40, 1e-40)
    assert expected(far).value == pytest.approx(expected(near).value, abs=1e-12)


def test_a_mass_below_the_bound_is_a_failure() -> None:
    assert expected(logs(0, 0, 0, 0.5, 0), min_mass=0.5).status is Status.OK
    verdict = expected(logs(0, 0, 0, 0.49, 0), min_mass=0.5)
    assert verdict.status is Status.FAILED
    assert "0.49 together, less than min_mass 0.5" in verdict.reason


def test_no_level_at_all_is_a_failure_also_without_a_bound() -> None:
    assert expected(logs(0, 0, 0, 0, 0)).status is Status.FAILED


def test_not_applicable_wins_only_over_all_levels_together() -> None:
    assert expected(logs(0.1, 0.1, 0, 0, 0), none=math.log(0.3)).status is Status.NOT_APPLICABLE
    assert expected(logs(0.2, 0.2, 0, 0, 0), none=math.log(0.3)).value == pytest.approx(1.5)


@pytest.mark.parametrize("value", [math.nan, 0.7, math.inf])
def test_numbers_that_are_no_log_probabilities_are_a_failure(value: float) -> None:
    assert expected(logs(0.1, 0.1, 0.1, 0.1, 0.1) | {4: value}).status is Status.FAILED
    assert expected(logs(0.1, 0.1, 0.1, 0.1, 0.1), none=value).status is Status.FAILED


def test_probabilities_of_more_than_one_are_a_failure() -> None:
    assert "more than 1" in expected(logs(0.9, 0.9, 0, 0, 0)).reason


@pytest.mark.parametrize(
    ("text", "status", "value"),
    [
        ("Good. Score: [4]", Status.OK, 4),
        ("**Score:** 5/5", Status.OK, 5),
        ("Score: [1] at first, then again\nscore: 3.", Status.OK, 3),
        ("Score: N/A", Status.NOT_APPLICABLE, 0),
        ("Score: [n / a]", Status.NOT_APPLICABLE, 0),
        ("Score: [0]", Status.FAILED, 0),
        ("Score: [-4]", Status.FAILED, 0),
        ("Score: [55]", Status.FAILED, 0),
        ("Score: [4.5]", Status.FAILED, 0),
        ("Score: [NaN]", Status.FAILED, 0),
        ("Score: [five]", Status.FAILED, 0),
        ("I would say 4", Status.FAILED, 0),
        ("scored: 4 of them", Status.FAILED, 0),
        ("", Status.FAILED, 0),
        ("I'm sorry, but I can't rate pictures of people.", Status.REFUSED, 0),
        ("I cannot assist with that.", Status.REFUSED, 0),
    ],
)
def test_a_written_score_is_one_of_the_levels_or_none(text: str, status: Status, value: float) -> None:
    verdict = written(text, LEVELS)
    assert (verdict.status, verdict.value) == (status, value)
    assert bool(verdict.reason) == (status is not Status.OK)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It is bright. Score: [4]", 4),
        ("**Score:** 5/5.\n", 5),
        ("Score: [4", 4),
        ("A score: 3 would need more light, but", None),
        ("Composition score: 3\nLight: good, as the", None),
    ],
)
def test_a_text_that_was_cut_off_states_a_score_only_at_its_end(text: str, value: int | None) -> None:
    verdict = written(text, LEVELS, is_cut=True)
    assert (verdict.value if verdict.status is Status.OK else None) == value
    assert written(text, LEVELS).status is Status.OK


def test_several_replies_are_one_when_more_than_half_have_a_score() -> None:
    four, five = (Verdict(status=Status.OK, value=v) for v in (4.0, 5.0))
    assert mean_of([four, five, five, failed("x")]).value == pytest.approx(14 / 3)
    assert mean_of([four, five, failed("x"), failed("y")]).reason == "x"
