"""Means over training seeds and prompts: known cases, and how often the interval holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from velatura.core.crossed import crossed_mean


def simulated(
    rng: np.random.Generator, seeds: int, prompts: int, of_seed: float, of_prompt: float, rest: float
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return (
        0.3
        + of_seed * rng.standard_normal((seeds, 1))
        + of_prompt * rng.standard_normal((1, prompts))
        + rest * rng.standard_normal((seeds, prompts))
    )


@pytest.mark.parametrize(
    ("of_seed", "of_prompt", "rest"), [(0.1, 0.3, 0.5), (0.0, 0.3, 0.5), (0.2, 0.0, 0.3), (0.05, 0.5, 0.1)]
)
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_holds_the_truth_at_least_as_often_as_it_says(
    seeds: int, of_seed: float, of_prompt: float, rest: float
) -> None:
    rng = np.random.default_rng(seeds)
    hits = 0
    for _ in range(600):
        found = crossed_mean(simulated(rng, seeds, 40, of_seed, of_prompt, rest))
        hits += found.low <= 0.3 <= found.high
    assert hits / 600 > 0.93


def test_prompts_alone_or_seeds_alone_would_be_too_narrow() -> None:
    rng = np.random.default_rng(0)
    hits = {"prompts": 0, "seeds": 0}
    for _ in range(600):
        values = simulated(rng, 3, 40, 0.1, 0.5, 0.1)
        for name, axis, t in (("prompts", 0, 2.023), ("seeds", 1, 4.303)):
            means = values.mean(axis=axis)
            hits[name] += abs(means.mean() - 0.3) < t * means.std(ddof=1) / math.sqrt(len(means))
    assert hits["prompts"] / 600 < 0.9
    rng, hits["seeds"] = np.random.default_rng(1), 0
    for _ in range(600):
        means = simulated(rng, 3, 40, 0.0, 0.5, 0.1).mean(axis=1)
        hits["seeds"] += abs(means.mean() - 0.3) < 4.303 * means.std(ddof=1) / math.sqrt(3)
    assert hits["seeds"] / 600 < 0.9


def test_the_mean_is_the_mean_and_each_seed_is_told() -> None:
    found = crossed_mean(np.array([[1.0, 3.0, math.nan], [3.0, 5.0, 9.0]]))
    assert (found.value, found.by_seed, found.n_prompts) == (3.0, (2.0, 4.0), 2)
    assert found.low < 2 and found.high > 4


def test_without_a_second_seed_or_prompt_there_is_no_interval() -> None:
    for values in ([[1.0, 2.0, 3.0]], [[1.0], [2.0]]):
        found = crossed_mean(np.array(values))
        assert math.isfinite(found.value) and math.isnan(found.low) and math.isnan(found.high)
    nothing = crossed_mean(np.array([[math.nan, 1.0], [1.0, math.nan]]))
    assert math.isnan(nothing.value) and nothing.n_prompts == 0


def test_what_never_differs_has_an_interval_of_no_width() -> None:
    found = crossed_mean(np.full((3, 5), 0.25))
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)
