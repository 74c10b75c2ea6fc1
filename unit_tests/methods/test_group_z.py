"""Group z-scores: invariances, missing scores, floors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from velatura.api import Admission, Prompt, RewardReport, Status
from velatura.rewards.advantages import GroupZ, GroupZOptions

P, G, R = 3, 8, 2
PAPER = GroupZOptions(std_floor=0, eps=1e-12, clip=100)


def prompts(count: int = P, text: str = "a cat") -> tuple[Prompt, ...]:
    return tuple(Prompt(id=str(p), text=text, task="t2i") for p in range(count))


def report(scores: Tensor | None = None, weight: tuple[float, ...] = (0.7, 0.3)) -> RewardReport:
    if scores is None:
        scores = torch.randn(P * G, R, generator=torch.Generator().manual_seed(0))
    groups = len(scores) // G
    return RewardReport(
        names=tuple(f"reward{r}" for r in range(scores.shape[1])),
        scores=scores,
        status=torch.zeros_like(scores, dtype=torch.int64),
        weight=torch.tensor(weight).expand(len(scores), -1).contiguous(),
        group=torch.arange(groups).repeat_interleave(G),
        prompts=prompts(groups),
    )


def marked(base: RewardReport, rows: slice | list[int], reward: int, status: Status, value: float) -> RewardReport:
    scores, statuses = base.scores.clone(), base.status.clone()
    scores[rows, reward] = value
    statuses[rows, reward] = int(status)
    return replace(base, scores=scores, status=statuses)


def values(base: RewardReport, options: GroupZOptions = PAPER) -> Tensor:
    return GroupZ(options).estimate(base).values


def test_advantages_are_the_weighted_sum_of_per_reward_group_z_scores() -> None:
    base = report()
    grouped = base.scores.double().reshape(P, G, R)
    z = (grouped - grouped.mean(1, keepdim=True)) / grouped.std(1, keepdim=True, correction=0)
    expected = (z * torch.tensor([0.7, 0.3])).sum(2).flatten().float()
    torch.testing.assert_close(values(base), expected)


def test_each_group_has_mean_zero() -> None:
    torch.testing.assert_close(values(report()).reshape(P, G).mean(1), torch.zeros(P), atol=1e-7, rtol=0)  # fp32


def test_an_affine_change_of_one_reward_changes_nothing() -> None:
    base = report()
    scores = base.scores.clone()
    scores[:, 1] = 40 * scores[:, 1] - 7
    torch.testing.assert_close(values(replace(base, scores=scores)), values(base), atol=1e-5, rtol=0)  # fp32 scores
    floored = GroupZOptions(std_floor=0.5)
    torch.testing.assert_close(values(replace(base, scores=scores), floored), values(base, floored), atol=1e-5, rtol=0)


def test_only_the_ratio_of_weights_matters() -> None:
    torch.testing.assert_close(values(report(weight=(14, 6))), values(report(weight=(0.7, 0.3))))


def test_a_reward_of_weight_zero_has_no_say() -> None:
    base = report(weight=(1, 0))
    torch.testing.assert_close(values(base), values(report(base.scores[:, :1], weight=(1,))))


def test_groups_are_told_apart_by_id_and_not_by_text_or_position() -> None:
    base = report()
    assert len({prompt.text for prompt in base.prompts}) == 1
    order = torch.randperm(P * G, generator=torch.Generator().manual_seed(1))
    mixed = replace(
        base, scores=base.scores[order], status=base.status[order], weight=base.weight[order], group=base.group[order]
    )
    torch.testing.assert_close(values(mixed), values(base)[order])
    renamed = replace(base, prompts=tuple(replace(p, text=f"other {p.id}") for p in base.prompts))
    assert torch.equal(values(renamed), values(base))


@pytest.mark.parametrize("status", [Status.FAILED, Status.REFUSED, Status.NOT_APPLICABLE])
def test_a_missing_score_enters_no_mean_whatever_number_it_carries(status: Status) -> None:
    results = [
        GroupZ().estimate(marked(report(), [3, 12], 0, status, garbage)) for garbage in (0.0, 1e30, float("nan"))
    ]
    for other in results[1:]:
        assert torch.equal(other.values, results[0].values) and torch.equal(other.valid, results[0].valid)
        assert other.metrics == results[0].metrics


def test_a_missing_score_leaves_the_others_their_own_statistics_and_weights() -> None:
    base = marked(report(), [2], 1, Status.FAILED, 99.0)
    z0 = values(report(base.scores[:, :1], weight=(1,)))
    torch.testing.assert_close(values(base)[2], z0[2])  # its one valid reward has all the weight
    kept = [i for i in range(G) if i != 2]
    z1 = base.scores[kept, 1].double()
    z1 = (z1 - z1.mean()) / z1.std(correction=0)
    torch.testing.assert_close(values(base)[kept], (0.7 * z0[kept] + 0.3 * z1).float())


def test_a_sample_whose_main_reward_failed_is_zero_and_not_valid() -> None:
    result = GroupZ().estimate(marked(report(), [2], 0, Status.FAILED, 5.0))  # reward 0 has 70 % of the weight
    assert result.values[2] == 0 and not result.valid[2]
    assert result.valid.sum() == P * G - 1


def test_a_reward_with_too_many_failures_in_a_group_does_not_count_there() -> None:
    base = marked(report(), [0, 1, 2], 1, Status.FAILED, 9.0)  # 5 of 8 is less than 3 / 4
    alone = values(report(base.scores[:, :1], weight=(1,)))
    result = GroupZ(PAPER).estimate(base)
    torch.testing.assert_close(result.values[:G], alone[:G])
    assert result.valid.all()
    torch.testing.assert_close(result.values[G:], values(report())[G:])  # elsewhere it does


def test_a_group_left_with_too_little_weight_is_dropped() -> None:
    result = GroupZ().estimate(marked(report(), [0, 1, 2], 0, Status.FAILED, 9.0))
    assert not result.valid[:G].any() and (result.values[:G] == 0).all()
    assert result.valid[G:].all()
    assert result.metrics["dropped_groups"] == pytest.approx(1 / P)


def test_a_reward_that_does_not_apply_to_a_prompt_leaves_its_weight_to_the_rest() -> None:
    base = marked(report(), slice(0, G), 0, Status.NOT_APPLICABLE, 0.0)
    alone = values(report(base.scores[:, 1:], weight=(1,)))
    result = GroupZ(PAPER).estimate(base)
    assert result.valid.all()
    torch.testing.assert_close(result.values[:G], alone[:G])


def test_a_constant_group_has_no_signal_and_is_valid() -> None:
    base = report()
    scores = base.scores.clone()
    scores[:G] = torch.tensor([0.1, 1 / 3])
    seven = marked(report(scores), [0], 0, Status.FAILED, 0.0)  # a mean over 7 is not exact in fp32
    result = GroupZ(GroupZOptions(std_floor=0, eps=1e-300, min_weight=0)).estimate(seven)
    assert (result.values[:G] == 0).all() and result.valid.all()
    assert result.metrics["zero_signal_groups"] == pytest.approx(1 / P)


def test_a_nearly_constant_group_is_not_blown_up() -> None:
    scores = report().scores.clone()
    scores[:G] = scores[:G] * 1e-3
    paper, floored = values(report(scores)), values(report(scores), GroupZOptions(std_floor=0.1))
    assert paper[:G].abs().max() > 1
    assert floored[:G].abs().max() < 0.05
    torch.testing.assert_close(floored[G:], paper[G:])


def test_advantages_are_clipped() -> None:
    scores = torch.zeros(2 * 8, 1)
    scores[0] = 1
    result = GroupZ(GroupZOptions(clip=2)).estimate(report(scores, weight=(1,)))
    assert result.values[0] == 2  # sqrt(7) before
    assert result.metrics["clipped"] == pytest.approx(1 / 16)


def test_prompts_that_were_filtered_out_carry_nothing_and_count_as_neither_dropped_nor_flat() -> None:
    keep = torch.tensor([True, False, True])
    admission = Admission(keep=keep, reason=("", "", ""), statistic=torch.ones(P))
    result = GroupZ().estimate(report().only(admission))
    assert torch.equal(result.valid, keep.repeat_interleave(G))
    assert result.metrics["dropped_groups"] == 0 and result.metrics["dropped_samples"] == 0


def test_a_report_without_any_score_is_all_zero_and_finite() -> None:
    result = GroupZ().estimate(
        marked(marked(report(), slice(None), 0, Status.FAILED, 1), slice(None), 1, Status.FAILED, 1)
    )
    assert not result.valid.any() and (result.values == 0).all()
    assert result.metrics["dropped_groups"] == 1 and result.metrics["mean_abs"] == 0


def test_a_single_sample_has_no_group_to_be_better_than() -> None:
    single = replace(report(torch.rand(8, 2)), group=torch.arange(8), prompts=prompts(8))
    assert not GroupZ().estimate(single).valid.any()
