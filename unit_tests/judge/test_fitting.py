"""The losses of a judge against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from velatura.rewards.judge.fitting import Losses, bradley_terry, expectation, rating_losses, shares, weighted
from velatura.rewards.judge.vlm import written_loss

LEVELS = (1, 2, 3, 4, 5)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_ratings_become_a_distribution_with_the_same_mean():
    q = shares([[3, 4, 4], [2.25], [1, 5]], LEVELS)
    expected = [[0, 0, 1 / 3, 2 / 3, 0], [0, 0.75, 0.25, 0, 0], [0.5, 0, 0, 0, 0.5]]
    torch.testing.assert_close(q, torch.tensor(expected))
    torch.testing.assert_close(q @ torch.arange(1.0, 6.0), torch.tensor([11 / 3, 2.25, 3.0]))


def test_the_expectation_is_over_the_levels_alone():
    """Half of the probability is elsewhere; it changes nothing."""
    assert float(expectation(logs(0.1, 0.1, 0.1, 0.1, 0.1), LEVELS)) == pytest.approx(3.0)
    assert float(expectation(logs(0, 0, 0, 0.3, 0.1), LEVELS)) == pytest.approx(4.25)


def test_every_loss_is_what_its_formula_says():
    p = logs(0.05, 0.05, 0.1, 0.5, 0.1)  # .2 of the probability is elsewhere
    q = shares([[3, 4, 4]], LEVELS).double()
    found = rating_losses(p, q, LEVELS, ["a"], Losses(expectation=1, cross_entropy=1, soft=1, pairs=1))
    mean = (0.05 + 0.1 + 0.3 + 2.0 + 0.5) / 0.8
    assert float(found["expectation"]) == pytest.approx((mean - 11 / 3) ** 2, rel=1e-4)  # shares are fp32
    assert float(found["cross_entropy"]) == pytest.approx(-math.log(0.5))
    kl = sum(x * math.log(x / y) for x, y in ((1 / 3, 0.1), (2 / 3, 0.5)))
    assert float(found["soft"]) == pytest.approx(kl, rel=1e-6)
    assert float(found["pairs"]) == 0.0


def test_only_losses_with_a_weight_are_computed_and_their_weights_count():
    p, q = logs(0.2, 0.2, 0.2, 0.2, 0.2), shares([[5]], LEVELS).double()
    weights = Losses(expectation=0.5, cross_entropy=0, soft=2)
    found = rating_losses(p, q, LEVELS, ["a"], weights)
    assert set(found) == {"expectation", "soft"}
    assert float(weighted(found, weights)) == pytest.approx(0.5 * 4 + 2 * math.log(5))


def test_bradley_terry_compares_pictures_of_one_prompt_only():
    marks, ratings = torch.tensor([4.0, 3.0, 1.0, 2.0]), torch.tensor([2.0, 3.0, 5.0, 5.0])
    a_above_b = math.log(1 + math.exp(-1))  # -log sigmoid(1)
    wrong, tie = a_above_b + 1, (a_above_b + a_above_b + 1) / 2
    assert float(bradley_terry(marks, ratings, ["x", "x", "y", "y"])) == pytest.approx((wrong + tie) / 2, rel=1e-6)
    assert float(bradley_terry(marks, ratings, ["x", "y", "z", "w"])) == 0.0


def test_the_gradient_moves_the_expectation_towards_the_ratings():
    logits = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    weights = Losses(expectation=1, cross_entropy=0.1, soft=0.1)
    for _ in range(300):
        found = rating_losses(logits.log_softmax(-1), shares([[4, 4, 5]], LEVELS).double(), LEVELS, ["a"], weights)
        (gradient,) = torch.autograd.grad(weighted(found, weights), logits)
        logits = (logits - 0.5 * gradient).detach().requires_grad_(True)
    assert float(expectation(logits.detach(), LEVELS)) == pytest.approx(13 / 3, abs=0.1)


def test_a_rationale_is_judged_by_its_own_tokens_and_no_others():
    """Two answers of 2 and 1 tokens, padded on the left; place k predicts token k + 1."""
    ids = torch.tensor([[9, 1, 2, 3], [9, 9, 1, 4]])
    logprobs = torch.full((2, 3, 5), -50.0)  # the last three places
    logprobs[0, 0, 2], logprobs[0, 1, 3], logprobs[1, 1, 4] = -0.5, -1.5, -3.0
    ids = ids.clamp(max=4)
    assert float(written_loss(logprobs, ids, [2, 1])) == pytest.approx((1.0 + 3.0) / 2)


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValidationError, match="every loss has weight 0"):
        Losses(expectation=0, cross_entropy=0)
