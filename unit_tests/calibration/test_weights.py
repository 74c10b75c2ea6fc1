"""Risk budgets, the no-harm constraint, and what groups say of noise and correlation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from velatura.core.calibration import (
    Measured,
    correlations,
    no_harm,
    risk_budget,
    risk_shares,
    sigma_hash,
    standard_errors,
    statistics,
)


def matrix(*upper: float) -> np.ndarray:
    """Symmetric, ones on the diagonal."""
    size = next(n for n in range(2, 10) if n * (n - 1) // 2 == len(upper))
    found = np.eye(size)
    for (i, j), value in zip(itertools.combinations(range(size), 2), upper, strict=True):
        found[i, j] = found[j, i] = value
    return found


def random_sigma(rng: np.random.Generator, size: int) -> np.ndarray:
    factors = rng.normal(size=(size, size + 2))
    covariance = factors @ factors.T
    scale = np.sqrt(np.diag(covariance))
    return covariance / np.outer(scale, scale)


def test_equal_shares_of_correlated_rewards() -> None:
    sigma = matrix(0.6, 0.1, -0.3)
    even = np.full(3, 1 / 3)
    np.testing.assert_allclose(risk_shares(sigma, even), [0.45, 0.34, 0.21], atol=0.01)
    found = risk_budget(sigma, even)
    np.testing.assert_allclose(found, [0.257, 0.343, 0.400], atol=5e-4)
    np.testing.assert_allclose(risk_shares(sigma, found), even, atol=1e-7)


def test_without_correlation_weights_are_roots_of_budgets_over_std() -> None:
    sigma, budget = np.diag([4.0, 1.0, 0.25]), np.array([0.5, 0.3, 0.2])
    expected = np.sqrt(budget) / np.sqrt(np.diag(sigma))
    np.testing.assert_allclose(risk_budget(sigma, budget), expected / expected.sum(), atol=1e-8)


def test_two_rewards_have_equal_weights_for_equal_shares_whatever_their_correlation() -> None:
    for rho in (-0.9, 0.0, 0.9):
        np.testing.assert_allclose(risk_budget(matrix(rho), np.array([0.5, 0.5])), [0.5, 0.5], atol=1e-7)


def test_shares_equal_budgets_whatever_the_correlations() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 8):
        for _ in range(10):
            sigma, budget = random_sigma(rng, size), rng.dirichlet(np.ones(size))
            found = risk_budget(sigma, budget)
            assert (found > 0).all() and found.sum() == pytest.approx(1)
            np.testing.assert_allclose(risk_shares(sigma, found), budget, atol=1e-6)


def test_a_budget_of_nothing_is_a_weight_of_nothing() -> None:
    found = risk_budget(matrix(0.6, 0.1, -0.3), np.array([0.5, 0.0, 0.5]))
    np.testing.assert_allclose(found, [0.5, 0, 0.5], atol=1e-8)


CONFLICT = matrix(0.5, -0.55, -0.45)


def test_a_guarded_reward_is_not_pushed_down() -> None:
    start = np.array([0.45, 0.45, 0.10])
    pull = CONFLICT @ start
    assert 0.3 * pull[2] / np.sqrt(start @ pull) == pytest.approx(-0.145, abs=1e-3)
    found = no_harm(CONFLICT, start, 0.05)
    assert found.is_feasible
    np.testing.assert_allclose(found.weights, [0.31, 0.34, 0.35], atol=6e-3)
    assert 0.3 * found.correlation[2] == pytest.approx(0.015, abs=1e-3)


def test_the_nearest_harmless_weights_against_a_grid() -> None:
    start = np.array([0.45, 0.45, 0.10])
    steps = np.linspace(0, 1, 401)
    best, least = None, np.inf
    for a, b in itertools.product(steps, steps):
        w = np.array([a, b, 1 - a - b])
        if w[2] < 0:
            continue
        pull = CONFLICT @ w
        if (pull / np.sqrt(w @ pull) >= 0.05).all() and (w - start) @ CONFLICT @ (w - start) < least:
            best, least = w, (w - start) @ CONFLICT @ (w - start)
    np.testing.assert_allclose(no_harm(CONFLICT, start, 0.05).weights, best, atol=5e-3)


def test_weights_that_harm_nobody_stay_as_they_are() -> None:
    start = np.array([0.257, 0.343, 0.400])
    found = no_harm(matrix(0.6, 0.1, -0.3), start, 0.05)
    assert found.is_feasible and (found.weights == start).all()


def test_a_guard_without_weight_is_kept_from_falling_and_gets_none() -> None:
    sigma = matrix(0.0, 0.5, -0.6)  # the third, a guard, likes the first and not the second
    found = no_harm(sigma, np.array([0.2, 0.8]), 0.05)
    assert found.is_feasible and len(found.weights) == 2
    assert found.correlation[2] == pytest.approx(0.05, abs=1e-4)
    assert found.weights[0] > 0.5


def test_what_cannot_be_kept_from_falling_gets_the_best_there_is() -> None:
    sigma = matrix(0.2, -0.5, -0.5)
    found = no_harm(sigma, np.array([0.7, 0.3]), 0.05)
    assert not found.is_feasible
    best = max(
        min(sigma[:, :2] @ np.array([a, 1 - a]) / np.sqrt(np.array([a, 1 - a]) @ sigma[:2, :2] @ np.array([a, 1 - a])))
        for a in np.linspace(0, 1, 2001)
    )
    assert np.nanmin(found.correlation) == pytest.approx(best, abs=1e-5)
    assert best < 0


def test_a_reward_without_a_budget_stays_without_a_weight() -> None:
    found = no_harm(CONFLICT, np.array([0.5, 0.0, 0.5]), 0.05)
    assert found.weights[1] == 0


def test_a_guard_that_never_varies_says_nothing() -> None:
    sigma = np.zeros((3, 3))
    sigma[:2, :2] = matrix(0.3)
    found = no_harm(sigma, np.array([0.5, 0.5]), 0.05)
    assert found.is_feasible and np.isnan(found.correlation[2])


def test_random_constraints_are_kept() -> None:
    rng = np.random.default_rng(1)
    feasible = 0
    for _ in range(30):
        sigma, start = random_sigma(rng, 5), rng.dirichlet(np.ones(3))
        found = no_harm(sigma, start, 0.05)
        assert found.weights.sum() == pytest.approx(1) and (found.weights >= 0).all()
        feasible += found.is_feasible
        if found.is_feasible:
            assert np.nanmin(found.correlation) >= 0.05 - 1e-3
    assert 3 < feasible < 30


GROUPS, SIZE = 300, 8


def measured(
    sigma: np.ndarray, noise: list[float], *, seed: int = 0, passes: int = 2, groups: int = GROUPS
) -> Measured:
    rng = np.random.default_rng(seed)
    true = rng.multivariate_normal(np.zeros(len(sigma)), sigma, size=groups * SIZE)
    scores = true + rng.normal(size=(passes, *true.shape)) * np.array(noise)
    return Measured(
        names=tuple("abcdef"[: len(sigma)]), scores=scores, valid=np.ones(scores.shape, dtype=bool),
        group=np.repeat(np.arange(groups), SIZE), shares={"general": np.ones(groups)},
    )  # fmt: skip


def test_noise_is_what_differs_between_two_scores_of_one_picture() -> None:
    found = statistics(measured(matrix(0.5, 0.0, 0.0), [0.0, 0.3, 2.0]))
    np.testing.assert_allclose(found.noise["general"], [0, 0.3, 2.0], rtol=0.06, atol=1e-12)
    np.testing.assert_allclose(found.spread["general"], np.sqrt([1, 1.09, 5.0]), rtol=0.03)
    assert found.reliability["general"][0] == 1
    assert found.reliability["general"][2] == pytest.approx(1 - 4 / 5, abs=0.05)


def test_a_failed_score_enters_no_statistic() -> None:
    base = measured(matrix(0.5), [0.1, 0.1])
    valid = base.valid.copy()
    valid[0, 3, 0] = valid[1, 10, 1] = False
    found = []
    for garbage in (0.0, 1e12, np.nan):
        scores = base.scores.copy()
        scores[~valid] = garbage
        told = Measured(names=base.names, scores=scores, valid=valid, group=base.group, shares=base.shares)
        with np.errstate(invalid="ignore"):
            found.append(statistics(told))
    for other in found[1:]:
        np.testing.assert_array_equal(other.noise["general"], found[0].noise["general"])
        np.testing.assert_array_equal(other.products, found[0].products)
        np.testing.assert_array_equal(other.spread["general"], found[0].spread["general"])


def test_correlations_are_those_of_the_rewards_within_groups() -> None:
    sigma = matrix(0.6, 0.1, -0.3)
    base = measured(sigma, [0.0, 0.0, 0.0])
    shifted = base.scores + np.repeat(np.random.default_rng(2).normal(size=(GROUPS, 3)) * 9, SIZE, axis=0)
    moved = Measured(names=base.names, scores=shifted, valid=base.valid, group=base.group, shares=base.shares)
    found = correlations(statistics(moved), np.ones(GROUPS), prior=1.0)
    np.testing.assert_allclose(found, sigma, atol=0.1)  # the pooled variance takes a little off the diagonal


def test_a_noisy_reward_keeps_its_budget_before_reliability() -> None:
    """Weights on scores after reliability would hand a noisy reward what reliability took away."""
    base = measured(np.diag([1.0, 1.0, 0.0025]), [0.5, 0.5, 1.0], groups=600)
    found, share = statistics(base), np.ones(600)
    even = np.full(3, 1 / 3)
    unshrunk = risk_budget(correlations(found, share, prior=100), even)
    np.testing.assert_allclose(unshrunk, even, atol=0.04)
    shrunk = risk_budget(correlations(found, share, prior=100, shrunk=True), even)
    assert shrunk[2] > 0.6


def test_a_small_category_leans_on_all() -> None:
    base = measured(matrix(0.8), [0, 0])
    rare = np.zeros(GROUPS)
    rare[:4] = 1
    told = Measured(
        names=base.names, scores=base.scores.copy(), valid=base.valid, group=base.group,
        shares={"rare": rare, "general": 1 - rare},
    )  # fmt: skip
    told.scores[:, : 4 * SIZE, 1] *= -1
    found = statistics(told)
    own, leaning = (correlations(found, rare, prior=prior)[0, 1] for prior in (1e-9, 100.0))
    pool = correlations(found, np.ones(GROUPS), prior=1e-9)[0, 1]
    assert own < -0.3
    assert leaning == pytest.approx((4 * own + 100 * pool) / 104, abs=1e-6)


def test_correlations_that_nobody_measured_are_none() -> None:
    base = measured(matrix(0.8), [0, 0], groups=5)
    valid = base.valid.copy()
    valid[:, :, 1] = False
    told = Measured(names=base.names, scores=base.scores, valid=valid, group=base.group, shares=base.shares)
    found = statistics(told)
    np.testing.assert_allclose(correlations(found, np.ones(5), prior=10)[1], [0, 1])
    assert np.isnan(found.noise["general"][1]) and np.isnan(found.spread["general"][1])
    assert correlations(found, np.ones(5), prior=10, shrunk=True)[1].tolist() == [0, 0]


def test_standard_errors_shrink_with_the_number_of_groups() -> None:
    budget = np.array([0.5, 0.2, 0.3])
    errors = []
    for groups in (40, 640):
        base = statistics(measured(matrix(0.6, 0.1, -0.3), [0, 0, 0], groups=groups))
        errors.append(
            standard_errors(base, np.ones(groups), [0, 1, 2], budget, prior=1e-9, resamples=100, seed=0).mean()
        )
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.35)


def test_a_matrix_has_a_name() -> None:
    assert sigma_hash(CONFLICT) == sigma_hash(CONFLICT + 1e-12) != sigma_hash(matrix(0.5, -0.55, -0.44))
