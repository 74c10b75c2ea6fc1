"""The numbers of a reward card: published examples, brute force, and simulations with a known answer."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import special, stats

from velatura.core.cards.agreement import (
    alpha_over,
    icc_2_1,
    krippendorff_alpha,
    rater_accuracy,
    rater_correlation,
    retest,
)
from velatura.core.cards.clusters import Draws, mean, ratio, resampled
from velatura.core.cards.comparing import (
    Pairs,
    accuracies,
    affine,
    calibration,
    correlations,
    fit_eps,
    fit_temperature,
    selection,
    three_way,
    within,
)

NAN = math.nan
DRAWS = Draws(bootstrap=500, seed=0)
FEW = Draws(bootstrap=60, seed=0)
KRIPPENDORFF = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]
"""Four observers, twelve units: the example of Krippendorff (2011)."""
SHROUT_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
"""Six targets, four judges (Shrout and Fleiss 1979, table 2)."""


def pairs(delta, human, share=None, clusters=None) -> Pairs:
    human = np.asarray(human, float)
    own = np.asarray((human + 1) / 2 if share is None else share, float)
    names = tuple(map(str, range(len(human)))) if clusters is None else tuple(clusters)
    return Pairs(delta=np.asarray(delta, float), share=own, human=human, clusters=names)


@pytest.mark.parametrize(("level", "known"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level, known):
    assert krippendorff_alpha(KRIPPENDORFF, level) == pytest.approx(known, abs=5e-4)


def test_alpha_is_observed_over_expected_disagreement_counted_by_hand():
    rng = np.random.default_rng(1)
    table = rng.integers(1, 4, size=(3, 30)).astype(float)
    table[rng.random(table.shape) < 0.2] = NAN
    units = [column[np.isfinite(column)] for column in table.T]
    units = [unit for unit in units if len(unit) > 1]
    said = np.concatenate(units)
    observed = sum(sum((a - b) ** 2 for a, b in product(u, u)) / (len(u) - 1) for u in units) / len(said)
    expected = sum((a - b) ** 2 for a, b in product(said, said)) / (len(said) * (len(said) - 1))
    assert krippendorff_alpha(table, "interval") == pytest.approx(1 - observed / expected)


def test_alpha_has_no_value_where_nothing_can_be_compared():
    assert math.isnan(krippendorff_alpha([[1.0, NAN], [NAN, 2.0]], "ordinal"))
    assert math.isnan(krippendorff_alpha([[3.0, 3.0], [3.0, 3.0]], "ordinal"))
    assert krippendorff_alpha([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], "ordinal") == 1


def test_alpha_of_raters_with_known_noise_is_the_share_of_variance_that_they_share():
    rng = np.random.default_rng(2)
    table = (4 * (rng.normal(size=400) + 0.5 * rng.normal(size=(4, 400)))).round() / 4
    found = alpha_over(table, "interval", [str(i) for i in range(400)], FEW)
    assert found.value == pytest.approx(0.8, abs=0.04)  # 1 / (1 + .25)
    assert found.low < 0.8 < found.high
    assert found.method == "percentile"


def test_icc_of_the_published_example():
    assert icc_2_1(SHROUT_FLEISS) == pytest.approx(0.29, abs=0.005)


def test_retest_finds_noise_and_reliability_that_were_put_in():
    rng = np.random.default_rng(3)
    table = rng.normal(0, 0.4, size=(800, 1)) + rng.normal(0, 0.2, size=(800, 3))
    table[5, 1] = NAN
    found = retest(table)
    assert (found.pictures, found.repeats) == (799, 3)
    assert found.sigma == pytest.approx(0.2, rel=0.05)
    assert found.icc == pytest.approx(0.8, abs=0.03)  # .16 / (.16 + .04)
    assert retest(np.array([[1.0, 1.0], [2.0, 2.0]])).icc == 1
    assert math.isnan(retest(np.ones((4, 2))).icc)


def test_accuracy_counts_ties_of_the_reward_as_wrong_or_half_and_leaves_out_those_of_people():
    found = accuracies(pairs([1, -2, 0, 3, NAN, 5], [1, 1, -1, 1, 1, 0]), DRAWS)
    assert found["strict"].value == pytest.approx(2 / 4)
    assert found["half"].value == pytest.approx(2.5 / 4)
    assert found["ties"].value == pytest.approx(1 / 4)
    assert found["half"].n == 4


def test_the_tie_threshold_is_the_best_of_all():
    rng = np.random.default_rng(4)
    for _ in range(20):
        delta, human = rng.integers(-4, 5, size=15), rng.integers(-1, 2, size=15)
        case = pairs(delta, human)
        found = fit_eps(case)
        score = {eps: three_way(case, eps, FEW).value for eps in sorted({0.0, *map(float, np.abs(delta))})}
        assert score[found] == max(score.values())
        assert found == min(eps for eps, value in score.items() if value == max(score.values()))


def test_a_known_temperature_is_found_and_then_calibrated():
    rng = np.random.default_rng(5)
    delta = rng.normal(0, 1.5, size=6000)
    human = np.where(rng.random(6000) < special.expit(delta / 0.7), 1.0, -1.0)
    case = pairs(delta, human)
    temperature = fit_temperature(case)
    assert temperature == pytest.approx(0.7, rel=0.06)
    right = calibration(case, temperature, FEW)
    wrong = calibration(case, temperature / 5, FEW)
    p = special.expit(delta / temperature)
    assert right["brier"].value == pytest.approx(float((p * (1 - p)).mean()), abs=0.01)
    assert right["ece"].value < 0.02
    assert wrong["ece"].value > 0.1
    assert sum(bin["n"] for bin in right["bins"]) == 6000
    turned = pairs(-delta, -human)
    assert calibration(turned, temperature, FEW)["ece"].value == pytest.approx(right["ece"].value)


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(6)
    x, y = rng.integers(0, 6, size=80).astype(float), rng.integers(0, 6, size=80).astype(float)
    y += x
    found = correlations(x, y, [str(i) for i in range(80)], FEW)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["kendall"].value == pytest.approx(stats.kendalltau(x, y).statistic)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(x, y).statistic)


def test_within_a_prompt_the_difficulty_of_prompts_does_not_help():
    """Scores that only tell prompts apart correlate over all pictures, and not at all within a prompt."""
    rng = np.random.default_rng(7)
    prompt = np.repeat(np.arange(60), 5)
    easy = rng.normal(size=60)[prompt]
    reward, human = easy + 0.1 * rng.normal(size=300), easy + 0.1 * rng.normal(size=300)
    names = [str(i) for i in prompt]
    assert correlations(reward, human, names, FEW)["spearman"].value > 0.9
    inside = within(reward, human, names, names, FEW)
    assert inside["spearman"].low < 0 < inside["spearman"].high
    assert inside["spearman"].n == 60
    assert inside["kendall"].value == pytest.approx(
        np.mean([stats.kendalltau(reward[prompt == p], human[prompt == p]).statistic for p in range(60)])
    )


def test_selection_is_the_share_of_the_gain_there_was():
    best = (np.array([0.1, 0.9, 0.2]), np.array([1.0, 5.0, 3.0]))
    worst = (np.array([0.9, 0.1, 0.2]), np.array([1.0, 5.0, 3.0]))
    tied = (np.array([0.9, 0.9, NAN]), np.array([1.0, 5.0, 3.0]))
    names = ["a", "b"]
    assert selection([best, best], names, DRAWS).value == 1
    assert selection([worst, worst], names, DRAWS).value == -1
    assert selection([tied, tied], names, DRAWS).value == 0
    assert selection([best, worst], names, DRAWS).value == 0


def test_the_ceiling_of_raters_who_err_with_a_known_rate():
    """Three raters, each wrong with probability e: one agrees with two others who agree."""
    rng = np.random.default_rng(8)
    error = 0.2
    truth = np.where(rng.random(4000) < 0.5, 1.0, -1.0)
    choices = truth * np.where(rng.random((3, 4000)) < error, -1.0, 1.0)
    both = (1 - error) ** 2 + error**2
    known = ((1 - error) ** 3 + error**3) / both
    found = rater_accuracy(choices, [str(i) for i in range(4000)], FEW)
    assert found.value == pytest.approx(known, abs=0.025)  # three standard errors


def test_the_ceiling_of_ratings_with_known_noise():
    rng = np.random.default_rng(9)
    table = rng.normal(size=500) + rng.normal(size=(3, 500))
    found = rater_correlation(table, [str(i) for i in range(500)], FEW)
    assert found.value == pytest.approx(1 / math.sqrt(2 * 1.5), abs=0.06)  # one rater, and the mean of two


def test_affine_finds_a_line():
    x = np.linspace(0, 1, 20)
    assert affine(x, 2 + 3 * x) == pytest.approx({"slope": 3.0, "intercept": 2.0})
    assert affine(np.ones(5), np.arange(5.0)) == {}


def test_pictures_of_one_prompt_are_not_independent():
    """Nominal 95 % intervals over clusters hold the truth about as often; over pictures far less often."""
    rng = np.random.default_rng(10)
    hits = {"clusters": 0, "pictures": 0}
    trials = 120
    for trial in range(trials):
        values = np.repeat(rng.normal(size=60), 4) + rng.normal(size=240)
        names = {"clusters": [str(i // 4) for i in range(240)], "pictures": [str(i) for i in range(240)]}
        for kind in hits:
            found = mean(values, names[kind], Draws(bootstrap=300, seed=trial))
            hits[kind] += found.low < 0 < found.high
    assert hits["clusters"] / trials > 0.88
    assert hits["pictures"] / trials < 0.86


def test_intervals_say_how_they_were_made():
    assert mean([0.0, 1.0, 1.0, 0.0, 1.0], list("abcde"), DRAWS).method == "BCa"
    assert mean([1.0, 1.0, 1.0], list("abc"), DRAWS).method == "constant"
    alone = mean([1.0, 0.0], ["a", "a"], DRAWS)
    assert alone.method == "none"
    assert math.isnan(alone.low)
    assert alone.plain() == {"value": 0.5, "low": None, "high": None, "method": "none", "clusters": 1, "n": 2}
    assert math.isnan(ratio([1.0], [0.0], ["a"], DRAWS).value)
    assert resampled(lambda rows: float(len(rows)), list("abc"), FEW).method == "percentile"
    assert resampled(lambda rows: NAN if 0 in rows else 1.0, list("abc"), FEW).method == "none"
