"""Weights that follow a policy whose samples begin to correlate otherwise than those of the first one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from velatura.api import Prompt, RewardReport
from velatura.core.calibrated import Calibration
from velatura.core.calibration import risk_shares
from velatura.core.recalibration import Recalibrator, Version
from velatura.core.reward_settings import Recalibrate
from velatura.core.weighing import Rules

NAMES = ("one", "two", "three")
G, PROMPTS = 8, 25
THIRDS = dict.fromkeys(NAMES, 1 / 3)
ALONE = np.eye(4)
AGREEING = np.array([[1, 0.6, 0.1, 0], [0.6, 1, -0.3, 0], [0.1, -0.3, 1, 0], [0, 0, 0, 1.0]])
"""The first three; equal shares are weights of .257, .343, .400 (and equal weights are shares of .45, .34, .21)."""
HARMED = np.array([[1, 0, 0, -0.5], [0, 1, 0, -0.5], [0, 0, 1, 0.2], [-0.5, -0.5, 0.2, 1]])
"""Nothing has changed between the rewards, but two of them push the guard down."""


def recalibrator(kappa: float = -1.0, **settings: float) -> Recalibrator:
    """After a calibration in which nothing correlates with anything, in steps of one update."""
    given = Recalibrate.model_validate({"every": 40, "groups": 200, "bootstrap": 30, **settings})
    calibration = Calibration(
        names=(*NAMES, "guard"), weights={"wall": THIRDS}, noise={"wall": dict.fromkeys((*NAMES, "guard"), 0.0)},
        spread={"wall": dict.fromkeys((*NAMES, "guard"), 1.0)},
        sigma={"wall": torch.eye(4, dtype=torch.float64)}, budgets={"wall": THIRDS},
    )  # fmt: skip
    rules = Rules(rewards=3, prior=1.0, kappa=kappa, bootstrap=given.bootstrap, seed=0)
    return Recalibrator(settings=given, rules=rules, calibration=calibration, every=given.every)


def report(step: int, sigma: np.ndarray) -> RewardReport:
    """Scores of 25 groups with these correlations; a few of them failed."""
    drawn = np.random.default_rng(step).multivariate_normal(np.zeros(4), sigma, size=PROMPTS * G)
    status = torch.zeros(PROMPTS * G, 4, dtype=torch.int64)
    status[::17, 1] = 1
    scores = torch.from_numpy(drawn).float()
    scores[status == 1] = 1e6
    return RewardReport(
        names=("watched", "guard", *NAMES), prompts=tuple(
            Prompt(id=f"{step}/{i}", text="a", task="t2i", category="wall") for i in range(PROMPTS)
        ),
        scores=torch.cat([torch.randn(PROMPTS * G, 1), scores[:, 3:], scores[:, :3]], 1),
        status=torch.cat([torch.zeros(PROMPTS * G, 1, dtype=torch.int64), status[:, 3:], status[:, :3]], 1),
        weight=torch.ones(PROMPTS * G, 5), group=torch.arange(PROMPTS).repeat_interleave(G),
    )  # fmt: skip


def went(own: Recalibrator, sigma: np.ndarray, steps: range) -> dict[int, Version]:
    """Step -> what was decided after it."""
    made = {}
    for step in steps:
        own.observe(step, report(step, sigma))
        for version in own.decide(step):
            made[step] = version
    return made


def weights(own: Recalibrator) -> list[float]:
    return [own.weights[name]["wall"] for name in NAMES]


def test_where_nothing_changes_no_weight_does_however_often_it_is_looked() -> None:
    own = recalibrator(every=10)
    made = went(own, ALONE, range(24))
    assert own.version == len(made)
    assert weights(own) == pytest.approx([1 / 3] * 3, abs=0.02)  # a change of a standard error is one in three
    assert set(made) <= {9, 19}


def test_a_share_that_drifts_is_brought_back_as_soon_as_it_is_known_in_steps_of_the_largest_change() -> None:
    own = recalibrator(max_change=0.05, drift=0.08)
    made = went(own, AGREEING, range(32))
    assert min(made) == 7  # 200 groups are 8 steps of 25
    first = made[7].weighed
    assert "the share of three has moved by -1" in first.reason and "the most at a time" in first.reason
    assert np.abs(first.weights[:3] - 1 / 3).max() == pytest.approx(0.05)
    assert sorted(made)[1] >= 15  # of groups that the first version has not seen
    assert [version.number for version in made.values()] == list(range(1, len(made) + 1))
    assert sum(weights(own)) == pytest.approx(1)
    np.testing.assert_allclose(weights(own), [0.257, 0.343, 0.400], atol=0.03)
    np.testing.assert_allclose(risk_shares(AGREEING[:3, :3], np.array(weights(own))), 1 / 3, atol=0.05)


def test_what_has_not_drifted_so_far_is_found_anew_after_so_many_steps() -> None:
    own = recalibrator(drift=0.9, every=10, max_change=1.0)
    made = went(own, AGREEING, range(12))
    assert list(made) == [9]
    assert made[9].weighed.reason.startswith("10 optimiser steps have passed")
    np.testing.assert_allclose(weights(own), [0.257, 0.343, 0.400], atol=0.03)
    assert own.calibration.sigma["wall"][0, 1] == pytest.approx(0.6, abs=0.06)


def test_a_guard_that_begins_to_be_pushed_down_is_kept_from_it_once_that_is_known() -> None:
    own = recalibrator(kappa=0.05, max_change=1.0)
    made = went(own, HARMED, range(20))
    assert list(made) == [7]
    assert made[7].weighed.reason.startswith("guard is pushed down, at a correlation of -0.")
    assert weights(own)[2] > 0.6
    effect = HARMED[3, :3] @ np.array(weights(own))
    assert effect > 0


def test_a_resumed_run_decides_what_it_would_have_decided() -> None:
    own, again = recalibrator(drift=0.05), recalibrator(drift=0.05)
    went(own, AGREEING, range(13))
    assert own.version == 1
    again.load_state_dict({name: value.clone() for name, value in own.state_dict().items()})
    assert again.weights == own.weights
    one, two = (went(each, AGREEING, range(13, 24)) for each in (own, again))
    assert list(one) == list(two) != []
    assert own.weights == again.weights
    assert torch.equal(own.calibration.sigma["wall"], again.calibration.sigma["wall"])
    again.load_state_dict(recalibrator().state_dict())
    assert again.weights == recalibrator().weights
