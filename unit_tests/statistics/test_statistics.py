"""Numbers with a known answer: closed forms, exact enumeration, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from velatura.core.statistics import estimate, holm, mean_interval, paired, retained, sign_flip

PROMPTS = ["a", "a", "b", "b", "c", "c"]


def test_seeds_are_averaged_within_a_prompt_before_prompts_are_averaged():
    found = estimate([0, 0, 0, 4], ["a", "a", "a", "b"], bootstrap=200, seed=0)
    assert found.value == 2.0  # not 1.0: prompt b counts as much as prompt a
    assert (found.n_prompts, found.n_samples) == (2, 4)


def test_a_constant_difference_has_an_interval_of_width_zero():
    found = paired([1.5] * 6, [1.0] * 6, PROMPTS, bootstrap=500, seed=0)
    assert (found.difference, found.low, found.high) == (0.5, 0.5, 0.5)
    assert math.isnan(found.effect)
    assert found.minimum_detectable == 0
    assert found.p == 0.25  # 2 of 8 sign patterns: the smallest that three prompts can show


def test_two_equal_models_differ_by_nothing():
    found = paired([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], PROMPTS, bootstrap=500, seed=0)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_effect_size_and_minimum_detectable_effect_follow_their_formulas():
    a, b = np.array([3.0, 5, 4, 6, 8, 1]), np.array([1.0, 2, 3, 4, 5, 0])
    d = (a - b).reshape(3, 2).mean(axis=1)
    found = paired(a, b, PROMPTS, bootstrap=500, seed=0)
    assert found.difference == pytest.approx(d.mean())
    assert found.effect == pytest.approx(d.mean() / d.std(ddof=1))
    assert found.minimum_detectable == pytest.approx(2.80 * d.std(ddof=1) / math.sqrt(3))


def test_samples_without_a_value_are_left_out_of_both_sides():
    found = paired([1, None, 5, 5, None, None], [0, 9, 3, math.nan, 1, 1], PROMPTS, bootstrap=200, seed=0)
    assert found.n_prompts == 2  # prompt c has no value of a at all
    assert (found.mean_a, found.mean_b) == (3.0, 1.5)


def test_no_values_at_all_is_an_answer_and_not_a_crash():
    found = paired([None] * 6, [1.0] * 6, PROMPTS, bootstrap=200, seed=0)
    assert found.n_prompts == 0
    assert found.p == 1
    assert math.isnan(estimate([None] * 6, PROMPTS, bootstrap=200, seed=0).value)


def test_one_prompt_has_no_interval():
    found = paired([1, 2], [0, 0], ["a", "a"], bootstrap=200, seed=0)
    assert found.difference == 1.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_prompt_per_value_is_demanded():
    with pytest.raises(ValueError, match="2 values and 1 prompts"):
        estimate([1, 2], ["a"], bootstrap=100, seed=0)


def test_the_sign_flip_test_enumerates_all_patterns_of_few_prompts():
    d = [1.0, 2.0, 3.0, 4.0]
    assert sign_flip(d, seed=0) == 2 / 16  # only all plus and all minus are as far out
    assert sign_flip([1.0, 1.0, 1.0, -1.0], seed=0) == 10 / 16  # |sum| >= 2: 8 patterns of 2, 2 of 4


def test_the_sign_flip_test_agrees_with_scipy():
    d = np.random.default_rng(3).normal(0.4, 1.0, size=11)
    scipy = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(d, seed=0) == pytest.approx(scipy.pvalue)


def test_the_drawn_sign_flip_test_agrees_with_the_t_test_for_normal_differences():
    d = np.random.default_rng(4).normal(0.25, 1.0, size=80)
    assert sign_flip(d, seed=0) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01)  # 3 sd of the draw: 0.005


def test_zeros_do_not_weaken_the_sign_flip_test():
    d = [1.0, 2.0, 3.0, 4.0]
    assert sign_flip(d + [0.0] * 40, seed=0) == sign_flip(d, seed=0)


def test_a_drawn_p_value_is_never_zero():
    assert sign_flip(np.full(100, 1.0), seed=0) == pytest.approx(1e-4)


def test_the_sign_flip_test_is_uniform_when_nothing_differs():
    rng = np.random.default_rng(5)
    p = [sign_flip(rng.normal(size=12), seed=0) for _ in range(300)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.04)  # 3 sd of 300 draws


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_of_many_normal_numbers_is_the_textbook_one():
    x = np.random.default_rng(6).normal(2.0, 1.0, size=2000)
    half = 1.96 * x.std(ddof=1) / math.sqrt(len(x))
    low, high = mean_interval(x, bootstrap=4000, seed=0)
    assert low == pytest.approx(x.mean() - half, abs=0.004)  # noise of a 2.5 % quantile of 4000
    assert high == pytest.approx(x.mean() + half, abs=0.004)


def test_bca_leans_towards_the_long_tail():
    x = np.random.default_rng(7).exponential(size=60)
    low, high = mean_interval(x, bootstrap=4000, seed=0)
    assert high - x.mean() > 1.1 * (x.mean() - low)


def test_the_same_seed_gives_the_same_interval():
    x = np.random.default_rng(8).normal(size=30)
    assert mean_interval(x, bootstrap=300, seed=1) == mean_interval(x, bootstrap=300, seed=1)
    assert mean_interval(x, bootstrap=300, seed=1) != mean_interval(x, bootstrap=300, seed=2)


def test_one_odd_prompt_gives_no_warning():
    low, high = mean_interval([0.0] * 30 + [1.0], bootstrap=500, seed=0)
    assert low <= 1 / 31 <= high


def test_a_student_with_most_of_the_gain():
    rng, n = np.random.default_rng(9), 200
    base = rng.normal(0.5, 0.2, n)
    gain = rng.normal(0.2, 0.1, n)
    prompts = [str(i) for i in range(n)]
    found = retained(base + 0.9 * gain, base, base + gain, prompts, bootstrap=500, seed=0)
    assert found.ratio == pytest.approx(0.9)
    assert found.low == pytest.approx(0.9)  # the student's gain is proportional, so every resample agrees
    assert found.is_meaningful


def test_a_share_of_a_gain_that_may_be_nothing_is_not_meaningful():
    rng, n = np.random.default_rng(10), 50
    base, teacher, student = rng.normal(size=(3, n))
    found = retained(student, base, teacher - teacher.mean() + base.mean(), [str(i) for i in range(n)],
                     bootstrap=300, seed=0)  # fmt: skip
    assert not found.is_meaningful
    assert math.isnan(found.low)


def test_a_teacher_whose_gain_vanishes_in_some_resamples_gives_no_warning():
    gain = np.array([2, 0, 2, 1, 2, 1, 0, 1, 2, 2, 0, 1, 2, 0, 1, 0, 0, 0, 2, -1]) / 4
    taught = np.array([2, -1, -1, 0, 3, 2, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 2, -1]) / 4
    prompts = [str(i) for i in range(20)]
    for seed in range(20):
        found = retained(gain, np.zeros(20), taught, prompts, bootstrap=400, seed=seed)
        assert found.is_meaningful == (found.low <= found.ratio <= found.high)


def test_clustered_intervals_cover_and_naive_ones_do_not():
    """60 prompts x 4 seeds, intraclass correlation 0.5: the variance of the mean is 2.5 times the naive one."""
    rng, trials = np.random.default_rng(11), 300
    prompts = [str(p) for p in range(60) for _ in range(4)]
    clustered = naive = 0
    for trial in range(trials):
        x = (rng.normal(size=(60, 1)) + rng.normal(size=(60, 4))).ravel()
        found = estimate(x, prompts, bootstrap=400, seed=trial)
        clustered += found.low <= 0 <= found.high
        low, high = mean_interval(x, bootstrap=400, seed=trial)
        naive += low <= 0 <= high
    assert 0.91 < clustered / trials < 0.98  # 0.95 within 3 sd of 300 trials
    assert naive / trials < 0.86  # 2 Phi(1.96 / sqrt(2.5)) - 1 = 0.785
