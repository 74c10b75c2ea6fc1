"""Budgets from people: what is fitted, what is refused, and what a file of pairs must be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize

from velatura.core.calibration import risk_budget
from velatura.core.errors import RecipeError
from velatura.core.preferences import Pairs, budgets_of, fit, folds, read_pairs, utilities


def made(truth: np.ndarray, prompts: int, *, seed: int = 0, per_prompt: int = 4) -> Pairs:
    """Pairs of two categories, preferred by chance as utilities say; scores and noise drawn."""
    rng = np.random.default_rng(seed)
    count = prompts * per_prompt
    difference = rng.normal(size=(count, truth.shape[1]))
    category = np.repeat(np.arange(prompts) % 2, per_prompt)
    chance = 1 / (1 + np.exp(-(difference * truth[category]).sum(1)))
    return Pairs(
        difference=difference, preferred=(rng.random(count) < chance).astype(float), shares=np.eye(2)[category],
        prompts=tuple(f"p{i}" for i in np.repeat(np.arange(prompts), per_prompt)),
    )  # fmt: skip


TRUTH = np.array([[2.0, 0.0, 0.5], [0.2, 1.5, 0.5]])


def test_utilities_are_found_again() -> None:
    np.testing.assert_allclose(utilities(made(TRUTH, 1500), 1e-6, 1e-6), TRUTH, atol=0.2)


def test_utilities_are_never_negative_and_penalties_draw_categories_together() -> None:
    against = made(np.array([[2.0, -1.0], [1.0, -1.0]]), 200)
    free, tied = utilities(against, 0.1, 0.1), utilities(against, 0.1, 1e6)
    assert (free[:, 1] == 0).all() and (free >= 0).all()
    np.testing.assert_allclose(tied[0], tied[1], atol=1e-3)
    assert free[0, 0] > free[1, 0] + 0.3


def test_the_fit_is_the_minimum_of_its_loss() -> None:
    """Against a solver that is told no gradient, on one category."""
    pairs = made(TRUTH, 40).only(np.tile(np.repeat([True, False], 4), 20))
    shares = np.ones((len(pairs.prompts), 1))
    one = Pairs(difference=pairs.difference, preferred=pairs.preferred, shares=shares, prompts=pairs.prompts)

    def loss(x: np.ndarray) -> float:
        logit = one.difference @ x[3:]
        return float(
            np.logaddexp(0, logit).sum()
            - one.preferred @ logit
            + 0.5 * x[:3] @ x[:3]
            + 2 * ((x[3:] - x[:3]) ** 2).sum()
        )

    found = minimize(loss, np.full(6, 0.1), bounds=[(0, None)] * 6, method="L-BFGS-B")
    np.testing.assert_allclose(utilities(one, 0.5, 2.0)[0], found.x[3:], atol=1e-3)


def test_a_fit_that_helps_on_other_prompts_is_used() -> None:
    found = fit(made(TRUTH * 2, 120), bootstrap=500, seed=0)
    assert found.refused == ""
    assert found.accuracy > found.equal + 0.05 and found.accuracy > found.single
    assert 0 < found.low < found.gain < found.high
    assert found.prompts == 120 and found.pairs == 480


def test_a_fit_that_is_no_better_than_equal_weights_is_refused() -> None:
    found = fit(made(np.ones((2, 3)), 60), bootstrap=500, seed=0)
    assert "may be nothing" in found.refused and found.low <= 0


def test_people_who_choose_by_chance_are_refused() -> None:
    found = fit(made(np.zeros((2, 3)), 60, seed=3), bootstrap=500, seed=0)
    assert "may be nothing" in found.refused


def test_few_prompts_are_refused() -> None:
    found = fit(made(TRUTH, 10), bootstrap=100, seed=0)
    assert "10 prompts with pairs are too few; 20 are needed" in found.refused


def test_pairs_of_a_prompt_are_never_on_both_sides_of_a_split() -> None:
    prompts = made(TRUTH, 37).prompts
    part = folds(prompts, 0)
    for name in set(prompts):
        assert len(set(part[[p == name for p in prompts]])) == 1
    assert sorted(np.bincount(part[::4])) == [7, 7, 7, 8, 8]


def test_budgets_of_utilities_give_the_utilities_back_as_weights() -> None:
    sigma = np.array([[1, 0.6, 0.1], [0.6, 1, -0.3], [0.1, -0.3, 1]])
    utility = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(risk_budget(sigma, budgets_of(utility, sigma)), utility, atol=1e-5)


def test_a_share_that_would_be_negative_is_nothing() -> None:
    sigma = np.array([[1, -0.9], [-0.9, 1]])
    assert budgets_of(np.array([1.0, 0.2]), sigma).tolist() == [1, 0]


LINE = {"prompt": "p1", "a": "0.png", "b": "1.png", "preferred": "a"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("0.png", "1.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path / "pairs.jsonl"


def test_a_file_of_pairs(file: Path) -> None:
    file.write_text(json.dumps(LINE) + "\n\n" + json.dumps({**LINE, "preferred": "tie"}) + "\n")
    assert [line.preferred for line in read_pairs(file, ["p1"])] == ["a", "tie"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "pairs.jsonl:1: this is not JSON"),
        (json.dumps({**LINE, "preferred": "c"}), "preferred: give 'a', 'b' or 'tie' (got 'c')"),
        (json.dumps({**LINE, "prefered": "a"}), "Did you mean 'preferred'?"),
        (json.dumps({**LINE, "prompt": "p2"}), "no prompt of this stage has the id 'p2'. Ids there are like 'p1'."),
        (json.dumps({**LINE, "b": "2.png"}), "there is no picture '2.png'"),
        ("", "there is no pair in it"),
    ],
)
def test_a_file_that_is_none(file: Path, line: str, words: str) -> None:
    file.write_text(line + "\n")
    with pytest.raises(RecipeError) as caught:
        read_pairs(file, ["p1"])
    assert words in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        read_pairs(tmp_path / "none.jsonl", [])
