"""Reliability: noise does not become signal, and what is remembered survives a checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from velatura.api import AdvantageEstimator, Calibration, Prompt, RewardReport, Status, VelaturaError
from velatura.core.errors import RecipeError
from velatura.core.judge import WeightedReward
from velatura.core.weight_ledger import require_prepared
from velatura.plugins.tinyworld.task import TinyWorld
from velatura.rewards.advantages import GroupZ, GroupZOptions, RawSum
from velatura.rewards.reliability import PooledStd, PooledStdOptions, ReliabilityZ, ReliabilityZOptions
from velatura.rewards.tinyworld import Aesthetics

G = 8


def report(scores: Tensor, metadata: list[dict[str, Any]] | None = None, weight: list[float] | None = None) -> Any:
    groups, rewards = len(scores) // G, scores.shape[1]
    return RewardReport(
        names=tuple("abc"[:rewards]),
        scores=scores.float(),
        status=torch.zeros(scores.shape, dtype=torch.int64),
        weight=torch.tensor(weight or [1.0] * rewards).expand(len(scores), -1).contiguous(),
        group=torch.arange(groups).repeat_interleave(G),
        prompts=tuple(
            Prompt(id=str(p), text="", task="t2i", metadata=metadata[p] if metadata else {}) for p in range(groups)
        ),
    )


def drawn(groups: int, spread: list[float], noise: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """True values and scores with noise, [B R]."""
    draw = torch.Generator().manual_seed(seed)
    shape = (groups * G, len(spread))
    true = torch.randn(shape, generator=draw, dtype=torch.float64) * torch.tensor(spread)
    return true, true + torch.randn(shape, generator=draw, dtype=torch.float64) * torch.tensor(noise)


def agreement(estimator: AdvantageEstimator[Any], true: Tensor, scores: Tensor) -> float:
    """Correlation of advantages with the centred sum of what is true."""
    wanted = true.sum(1).reshape(-1, G)
    wanted = (wanted - wanted.mean(1, keepdim=True)).flatten()
    made = estimator.estimate(report(scores)).values.double()
    return float(torch.corrcoef(torch.stack([made, wanted]))[0, 1])


def reliability(**options: Any) -> ReliabilityZ:
    return ReliabilityZ(ReliabilityZOptions.model_validate({"clip": None} | options))


def test_a_reward_without_signal_gets_no_say() -> None:
    """Three rewards, one of them pure noise: the plain z-score blows it up to unit variance."""
    true, scores = drawn(8000, [0.1, 0.1, 0.0], [0.05, 0.05, 0.05])
    noise = dict.fromkeys("abc", 0.05)
    plain = GroupZ(GroupZOptions(std_floor=0, eps=1e-12, clip=100))
    assert agreement(RawSum(), true, scores) == pytest.approx(0.854, abs=0.01)
    assert agreement(plain, true, scores) == pytest.approx(0.705, abs=0.01)
    assert agreement(reliability(nu=0, noise=noise), true, scores) == pytest.approx(0.869, abs=0.01)
    assert agreement(reliability(noise=noise), true, scores) == pytest.approx(0.879, abs=0.01)


def test_failures_scored_as_zero_spoil_what_masking_keeps() -> None:
    draw = torch.Generator().manual_seed(4)
    true = 0.7 + 0.08 * torch.randn(6000 * G, 1, generator=draw, dtype=torch.float64)
    failed = torch.rand(len(true), generator=draw) < 0.02
    base = report(true)
    masked = replace(base, status=torch.where(failed[:, None], int(Status.FAILED), 0))
    zeroed = report(true.masked_fill(failed[:, None], 0.0))
    wanted = (true.reshape(-1, G) - true.reshape(-1, G).mean(1, keepdim=True)).flatten()

    def quality(given: RewardReport) -> float:
        made = reliability(nu=0, noise={"a": 0.0}).estimate(given).values.double()
        return float(torch.corrcoef(torch.stack([made, wanted]))[0, 1])

    assert quality(zeroed) == pytest.approx(0.861, abs=0.015)
    assert quality(masked) == pytest.approx(0.953, abs=0.01)


def test_without_noise_and_memory_it_is_the_group_z_score_up_to_scale() -> None:
    true, _ = drawn(40, [0.3, 2.0], [0, 0])
    made = reliability(nu=0, noise={"a": 0, "b": 0}, eps=1e-20).estimate(report(true)).values
    plain = GroupZ(GroupZOptions(std_floor=0, eps=1e-12, clip=100)).estimate(report(true)).values
    ratio = made / plain
    torch.testing.assert_close(ratio, ratio.mean().expand(len(ratio)), rtol=1e-3, atol=0)


def test_the_equations_by_hand() -> None:
    scores = drawn(3, [1.0], [0.0], seed=5)[1]
    sigma, nu, decay = 0.6, 4.0, 0.9
    estimator = reliability(noise={"a": sigma}, nu=nu, decay=decay, eps=1e-12, clip=1.2, prior_groups=7)
    made = estimator.estimate(report(scores)).values.double().reshape(3, G)
    x = scores.float().double().reshape(3, G)
    s2 = x.var(1)
    shat2 = ((G - 1) * s2 + nu * s2.mean()) / (G - 1 + nu)
    rho = (1 - sigma**2 / shat2).clamp(0, 1)
    z = (x - x.mean(1, keepdim=True)) / shat2.sqrt()[:, None]
    telling = rho > 0.3
    assert telling.any()
    products = (z.square().sum(1) / (G - 1))[telling]
    variance = (products.sum() + 7 * products.mean()) / (len(products) + 7)
    expected = (rho[:, None] * z / variance.sqrt()).clamp(-1.2, 1.2)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)


def test_one_group_alone_without_signal_is_quiet() -> None:
    true, scores = drawn(64, [1.0], [0.1])
    scores[:G] = 0.5 + 0.1 * (true[:G])  # as spread out as noise is
    made = reliability(noise={"a": 0.1}).estimate(report(scores)).values.reshape(-1, G)
    plain = GroupZ(GroupZOptions(std_floor=0)).estimate(report(scores)).values.reshape(-1, G)
    assert float(made[0].abs().mean()) < 0.5 * float(plain[0].abs().mean())


def test_advantages_have_unit_variance_whatever_the_weights_and_correlations() -> None:
    true, _ = drawn(500, [1.0, 1.0, 1.0], [0, 0, 0])
    mixed = torch.stack([true[:, 0], 0.9 * true[:, 0] + 0.436 * true[:, 1], 5 * true[:, 2]], 1)
    for weight in ([1.0, 1.0, 1.0], [8.0, 1.0, 0.1]):
        estimator = reliability(noise=dict.fromkeys("abc", 0.0))
        made = estimator.estimate(report(mixed, weight=weight)).values.double().reshape(-1, G)
        assert float(made.var(1).mean()) == pytest.approx(1, abs=0.05)


def test_pooled_std_lets_quiet_groups_be_quiet() -> None:
    """Group spreads lognormal(-2.5, 0.9): the quietest quarter has a quarter of all squared z-scores, and next to
    nothing of the pooled ones."""
    draw = torch.Generator().manual_seed(6)
    spread = torch.exp(-2.5 + 0.9 * torch.randn(2000, 1, generator=draw, dtype=torch.float64))
    scores = (torch.randn(2000, G, generator=draw, dtype=torch.float64) * spread).reshape(-1, 1)
    quiet = spread[:, 0].argsort()[:500]

    def share(estimator: AdvantageEstimator[Any]) -> float:
        squares = estimator.estimate(report(scores)).values.double().square().reshape(-1, G).sum(1)
        return float(squares[quiet].sum() / squares.sum())

    assert share(GroupZ(GroupZOptions(std_floor=0, clip=None))) == pytest.approx(0.25, abs=0.01)
    assert share(PooledStd(PooledStdOptions(clip=None))) < 0.015


def test_the_pooled_variance_is_a_moving_mean() -> None:
    first, second = drawn(4, [1.0], [0.0], seed=7)[1], 3 * drawn(4, [1.0], [0.0], seed=8)[1]
    estimator = PooledStd(PooledStdOptions(decay=0.5, eps=1e-12, clip=None))
    estimator.estimate(report(first))
    made = estimator.estimate(report(second)).values.double().reshape(4, G)
    one, two = (x.float().double().reshape(4, G) for x in (first, second))
    pooled = (0.5 * one.var(1).mean() + two.var(1).mean()) / 1.5
    torch.testing.assert_close(made, (two - two.mean(1, keepdim=True)) / pooled.sqrt(), atol=1e-5, rtol=0)


def test_categories_are_remembered_apart_and_a_prompt_of_two_lies_between() -> None:
    categories = [{"categories": {"quiet": 1.0}}, {"categories": {"loud": 1.0}},
                  {"categories": {"quiet": 0.25, "loud": 0.75}}]  # fmt: skip
    scores = drawn(3, [1.0], [0.0], seed=9)[1]
    scores[:G] *= 0.1
    estimator = PooledStd(PooledStdOptions(eps=1e-12, clip=None))
    made = estimator.estimate(report(scores, categories)).values.double().reshape(3, G)
    x = scores.float().double().reshape(3, G)
    quiet = (x[0].var() + 0.25 * x[2].var()) / 1.25
    loud = (x[1].var() + 0.75 * x[2].var()) / 1.75
    centred = x - x.mean(1, keepdim=True)
    expected = centred / torch.stack([quiet, loud, 0.25 * quiet + 0.75 * loud]).sqrt()[:, None]
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [lambda: reliability(noise={"a": 0.1, "b": 0.2}), PooledStd])
def test_a_restored_memory_gives_the_same_advantages_bit_for_bit(make: Any) -> None:
    batches = [report(drawn(6, [1.0, 0.3], [0.1, 0.2], seed=seed)[1]) for seed in range(4)]
    whole, before = make(), make()
    expected = [whole.estimate(batch).values for batch in batches]
    for batch in batches[:2]:
        before.estimate(batch)
    after = make()
    after.load_state_dict({key: value.clone() for key, value in before.state_dict().items()})
    for batch, wanted in zip(batches[2:], expected[2:], strict=True):
        assert torch.equal(after.estimate(batch).values, wanted)
    fresh = make()
    assert not torch.equal(fresh.estimate(batches[3]).values, expected[3])


def calibration(noise: float, rho: float = 0.5) -> Calibration:
    return Calibration(
        names=("b", "a", "guard"),
        weights={"general": {"a": 0.5, "b": 0.5}},
        noise={"general": {"a": noise, "b": 0.0}},
        spread={"general": {"a": 1.0, "b": 1.0}},
        sigma={"general": torch.tensor([[1, rho, 0], [rho, 1, 0], [0, 0, 1]], dtype=torch.float64)},
    )


def test_noise_and_correlations_come_from_a_calibration() -> None:
    scores = drawn(10, [1.0, 1.0], [0.0, 0.0])[1]
    noisy = reliability(eps=1e-12)
    noisy.calibrate(calibration(noise=100.0))
    by_hand = reliability(nu=4, noise={"a": 100.0, "b": 0.0}, eps=1e-12)
    by_hand.calibrate(calibration(noise=0.0))
    assert torch.equal(noisy.estimate(report(scores)).values, by_hand.estimate(report(scores)).values)
    alone = reliability(noise={"a": 0.0, "b": 0.0}, eps=1e-12)
    alone.calibrate(calibration(noise=0.0, rho=1.0))
    apart = reliability(noise={"a": 0.0, "b": 0.0}, eps=1e-12)
    apart.calibrate(calibration(noise=0.0, rho=0.0))
    ratio = apart.estimate(report(scores)).values / alone.estimate(report(scores)).values
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(2)))  # sqrt(1) against sqrt(1 / 2)


def test_noise_may_differ_by_category_and_a_category_without_is_said() -> None:
    estimator = reliability(noise={"a": {"general": 0.1}})
    estimator.estimate(report(drawn(2, [1.0], [0.1])[1]))
    with pytest.raises(VelaturaError, match="noise of reward 'a' is not known for prompts of category 'portrait'"):
        estimator.estimate(report(drawn(1, [1.0], [0.1])[1], [{"categories": {"portrait": 1.0}}]))


def test_the_noise_of_every_weighted_reward_has_to_be_known() -> None:
    weights = {"a": 1.0, "b": 0.5, "alarm": 0.0}
    said = reliability(noise={"a": 0.1}).complaint(weights, calibrated=False)
    assert "how noisy 'b' is" in said and "weights_from" in said
    assert reliability(noise={"a": 0.1}).complaint(weights, calibrated=True) == ""
    assert "Did you mean 'alarm'?" in reliability(noise={"alrm": 0.1}).complaint(weights, calibrated=True)


def test_a_noise_that_is_missing_in_a_category_is_said_before_anything_is_drawn() -> None:
    """Where the reward has a weight; where it has none nothing is asked, also in a batch of both."""
    estimator = reliability(noise={"a": {"general": 0.1}})
    reward = WeightedReward(label="a", at="", model=Aesthetics(), weight_by_category={"portrait": 0.0})
    general = replace(TinyWorld().prompts("train")[0], category="general")
    portrait = replace(general, category="portrait")
    require_prepared(estimator, [reward], [general, portrait], "here")
    with pytest.raises(RecipeError, match=r"here: .*noise of reward 'a' is not known .* 'portrait'"):
        require_prepared(estimator, [replace(reward, weight_by_category={})], [general, portrait], "here")
    mixed = report(drawn(2, [1.0], [0.1])[1], [{}, {"categories": {"portrait": 1.0}}])
    mixed = replace(mixed, weight=(mixed.group == 0).float()[:, None])
    assert estimator.estimate(mixed).values[:G].abs().sum() > 0


def prompt(categories: object) -> Prompt:
    base = TinyWorld().prompts("train")[0]
    return replace(base, category="portrait", metadata={**base.metadata, "categories": categories})


def test_a_weight_is_mixed_by_membership() -> None:
    reward = WeightedReward(
        label="aesthetics", at="", model=Aesthetics(), weight=1.0, weight_by_category={"portrait": 0.2, "single": 0.6}
    )
    assert reward.weight_for(replace(prompt({}), metadata=TinyWorld().prompts("train")[0].metadata)) == 0.2
    assert reward.weight_for(prompt({"portrait": 0.7, "single": 0.1, "unheard-of": 0.2})) == pytest.approx(0.4)


@pytest.mark.parametrize("wrong", [{"portrait": 0.7}, {"portrait": -0.5, "single": 1.5}, ["portrait"], {"a": "1"}, {}])
def test_shares_that_are_none_are_said(wrong: object) -> None:
    with pytest.raises(VelaturaError, match="write categories with shares that sum to 1"):
        _ = prompt(wrong).membership
