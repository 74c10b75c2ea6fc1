from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from velatura.api import NoOptions, Prompt, RewardModel, Sample, Scores, Status
from velatura.core.errors import RewardError
from velatura.core.judge import Judge, WeightedReward

Answer = Callable[[Sequence[Sample]], Any]


def samples(*groups: int, category: str = "general") -> list[Sample]:
    """As many samples of each group as are asked for; sample i has seed i."""
    made: list[Sample] = []
    for group, count in enumerate(groups):
        prompt = Prompt(id=f"p/{group}", text="a red circle", task="t2i", category=category)
        made += [
            Sample(prompt=prompt, image=torch.zeros(3, 2, 2), seed=len(made) + j, group=group) for j in range(count)
        ]
    return made


def prompts_of(made: Sequence[Sample]) -> list[Prompt]:
    return list({s.prompt.id: s.prompt for s in made}.values())


def by_seed(shown: Sequence[Sample]) -> Scores:
    return Scores.of(torch.tensor([float(s.seed) for s in shown]))


class Reward(RewardModel[NoOptions]):
    """Answers whatever it is given, and remembers what it was shown."""

    name = "reward"

    def __init__(self, answer: Answer = by_seed, *, scope: str = "sample", wants: str | None = None) -> None:
        super().__init__()
        self.answer, self.scope, self.wants = answer, scope, wants  # type: ignore[misc]
        self.shown: list[list[int]] = []

    def applies(self, prompt: Prompt) -> bool:
        return self.wants is None or prompt.category == self.wants

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.shown.append([s.seed for s in samples])
        return self.answer(samples)


def judge(*rewards: Reward, max_failed: float = 1.0, **options: Any) -> Judge:
    weighted = [
        WeightedReward(label=f"r{i}", at=f"stages.a.rewards.{i}", model=model, **options)
        for i, model in enumerate(rewards)
    ]
    return Judge(weighted, max_failed=max_failed)


def report_on(made: Sequence[Sample], *rewards: Reward, **options: Any) -> Any:
    with judge(*rewards, **options) as judging:
        judging.submit(made)
        return judging.report(prompts_of(made))


def raises(shown: Sequence[Sample]) -> Scores:
    raise RuntimeError("the model server is down")


def bad(seed: int, answer: Answer = raises) -> Answer:
    """Fails wherever the sample `seed` is among those shown."""
    return lambda shown: answer(shown) if any(s.seed == seed for s in shown) else by_seed(shown)


def test_scores_come_in_the_order_of_submission() -> None:
    made = samples(2, 2)
    with judge(Reward(), Reward(lambda shown: Scores.of(torch.full((len(shown),), 0.5)))) as judging:
        judging.submit(made[:2])
        judging.submit(made[2:])
        report = judging.report(prompts_of(made))
    assert report.names == ("r0", "r1")
    assert report.scores.tolist() == [[0, 0.5], [1, 0.5], [2, 0.5], [3, 0.5]]
    assert report.group.tolist() == [0, 0, 1, 1]
    assert report.valid.all()
    assert report.scores.dtype == torch.float32


def test_a_report_holds_what_was_submitted_since_the_last_one() -> None:
    made = samples(2, 2)
    with judge(Reward()) as judging:
        judging.submit(made[:2])
        judging.report(prompts_of(made[:2]))
        judging.submit(made[2:])
        assert judging.report(prompts_of(made[2:])).scores.flatten().tolist() == [2, 3]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (raises, "RuntimeError: the model server is down"),
        (lambda shown: Scores.of(torch.zeros(len(shown) + 1)), "3 scores and 3 statuses for 2 samples"),
        (lambda shown: Scores.of(torch.zeros(len(shown), 1)), "2 samples"),
        (lambda shown: Scores.of(torch.zeros(1)), "for 2 samples"),
        (lambda shown: [0.0] * len(shown), "returned list instead of Scores"),
        (lambda shown: None, "returned NoneType instead of Scores"),
        (lambda shown: Scores(values=[0.0, 1.0], status=(Status.OK,) * 2), "list"),
        (lambda shown: Scores(values=torch.zeros(2), status=(Status.OK, 17)), "17"),
        (lambda shown: Scores(values=torch.zeros(2), status=(Status.OK,) * 2, reasons=("a",)), "reasons"),
        (lambda shown: Scores(values=torch.zeros(2), status=(Status.OK,) * 2, notes=("a",)), "1 notes for 2"),
        (lambda shown: Scores(values=torch.tensor(0.0), status=(Status.OK,) * 2), "2 samples"),
    ],
)
def test_an_answer_that_is_no_answer_is_a_failure_with_a_reason(answer: Answer, reason: str) -> None:
    """A group reward is asked once for the whole group, so that the wrong count stays wrong."""
    report = report_on(samples(2), Reward(answer, scope="group"))
    assert report.status.flatten().tolist() == [Status.FAILED] * 2
    assert not report.valid.any()
    assert all(reason in said for said in report.reasons[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_a_failure_of_its_sample_alone(value: float) -> None:
    report = report_on(samples(3), Reward(lambda shown: Scores.of(torch.tensor([1.0, value, 3.0]))))
    assert report.status.flatten().tolist() == [Status.OK, Status.FAILED, Status.OK]
    assert report.scores.flatten().tolist() == [1, 0, 3]
    assert f"score is {value}" in report.reasons[0][1]
    assert report.composite.isnan().tolist() == [False, True, False]


def test_a_refusal_and_its_reason_are_kept() -> None:
    def refuse(shown: Sequence[Sample]) -> Scores:
        nan = torch.tensor([1.0, float("nan")])
        return Scores(values=nan, status=(Status.OK, Status.REFUSED), reasons=("", "no opinion on this"))

    report = report_on(samples(2), Reward(refuse))
    assert report.status.flatten().tolist() == [Status.OK, Status.REFUSED]
    assert report.reasons[0][1] == "no opinion on this"


def test_a_reward_that_does_not_apply_is_never_shown_the_sample() -> None:
    made = [*samples(2, category="portrait"), *samples(2, category="pair")]
    reward = Reward(wants="portrait")
    report = report_on(made, reward)
    assert reward.shown == [[0, 1]]
    assert report.status.flatten().tolist() == [Status.OK] * 2 + [Status.NOT_APPLICABLE] * 2
    assert report.weight.flatten().tolist() == [1, 1, 0, 0]


def test_a_retry_may_succeed() -> None:
    answers = iter([raises, by_seed])
    reward = Reward(lambda shown: next(answers)(shown))  # noqa: PLW0108
    with judge(reward, max_failed=0.0) as judging:
        judging.submit(samples(2))
        assert judging.report(prompts_of(samples(2))).valid.all()
        assert not judging.failures
    assert reward.shown == [[0, 1], [0, 1]]


@pytest.mark.parametrize("answer", [raises, lambda shown: Scores.of(torch.zeros(99)), lambda shown: "nonsense"])
def test_one_bad_sample_spoils_no_other(answer: Answer) -> None:
    report = report_on(samples(2, 2), Reward(bad(2, answer)))
    assert report.status.flatten().tolist() == [Status.OK, Status.OK, Status.FAILED, Status.OK]
    assert report.scores.flatten().tolist() == [0, 1, 0, 3]


def test_one_bad_reward_spoils_no_other() -> None:
    report = report_on(samples(2), Reward(raises), Reward())
    assert report.valid.tolist() == [[False, True], [False, True]]
    assert report.scores[:, 1].tolist() == [0, 1]


def test_a_group_reward_sees_one_whole_group_at_a_time() -> None:
    reward = Reward(bad(4), scope="group")
    report = report_on(samples(2, 3, 1), reward)
    assert reward.shown[0] == [0, 1]
    assert all(shown in ([0, 1], [2, 3, 4], [5]) for shown in reward.shown)
    assert report.valid.flatten().tolist() == [True, True, False, False, False, True]


def test_a_gate_that_raises_names_the_reward_and_its_place() -> None:
    class Gated(Reward):
        def applies(self, prompt: Prompt) -> bool:
            raise KeyError("face")

    with pytest.raises(RewardError, match=r"stages\.a\.rewards\.0: .applies. of reward 'r0' raised KeyError: 'face'"):
        report_on(samples(2), Gated())


def test_too_many_failures_stop_the_run_and_name_place_reward_and_reason() -> None:
    with judge(Reward(), Reward(bad(3)), max_failed=0.05) as judging:
        judging.submit(samples(12))
        with pytest.raises(RewardError) as caught:
            judging.report(prompts_of(samples(12)))
    assert str(caught.value).startswith("stages.a.rewards.1: reward 'r1' gave no score for 1 of its last 12 samples")
    assert "budget `max_failed` is 5%" in str(caught.value)
    assert "RuntimeError: the model server is down" in str(caught.value)


def test_a_hiccup_among_a_few_scores_stops_nothing_but_a_dead_reward_does() -> None:
    with judge(Reward(bad(3)), max_failed=0.05) as judging:
        judging.submit(samples(4))
        assert judging.report(prompts_of(samples(4))).valid.sum() == 3
    with judge(Reward(raises), max_failed=0.05) as judging:
        judging.submit(samples(4))
        with pytest.raises(RewardError, match="4 of its last 4"):
            judging.report(prompts_of(samples(4)))


def test_every_score_of_a_large_report_counts() -> None:
    with judge(Reward(lambda s: raises(s) if s[0].seed < 80 else by_seed(s), scope="group"), max_failed=0.1) as judging:
        judging.submit(samples(300)[:80])
        judging.submit(samples(300)[80:])
        with pytest.raises(RewardError, match="80 of its last 300"):
            judging.report(prompts_of(samples(300)))


def test_a_failed_score_is_asked_for_again() -> None:
    calls: list[int] = []

    def once_nan(shown: Sequence[Sample]) -> Scores:
        calls.append(len(shown))
        values = torch.tensor([float(s.seed) for s in shown])
        return Scores.of(torch.where(values == 1, torch.nan, values) if len(calls) == 1 else values)

    report = report_on(samples(3), Reward(once_nan))
    assert report.valid.all()
    assert calls == [3, 1]


def test_a_reward_never_runs_beside_itself() -> None:
    busy = threading.Lock()

    def alone(shown: Sequence[Sample]) -> Scores:
        assert busy.acquire(blocking=False)
        time.sleep(0.01)
        busy.release()
        return by_seed(shown)

    with judge(Reward(alone), max_failed=0.0) as judging:
        for sample in samples(6):
            judging.submit([sample])
        assert judging.report(prompts_of(samples(6))).valid.all()


def test_failures_within_the_budget_are_counted_and_masked() -> None:
    refuse = Scores(values=torch.zeros(1), status=(Status.REFUSED,))
    with judge(Reward(bad(3)), Reward(lambda s: refuse if len(s) == 1 else None), max_failed=1.0) as judging:
        judging.submit(samples(4))
        report = judging.report(prompts_of(samples(4)))
        assert judging.failures == {("r0", "failed"): 1, ("r1", "refused"): 4}
    assert report.valid.sum() == 3


def test_the_budget_is_over_several_reports() -> None:
    with judge(Reward(lambda s: raises(s) if s[0].seed < 5 else by_seed(s), scope="group"), max_failed=0.5) as judging:
        judging.submit(samples(10)[5:])
        judging.report(prompts_of(samples(10)))
        judging.submit(samples(10)[:5])
        judging.report(prompts_of(samples(10)))
        judging.submit(samples(10)[:5])
        with pytest.raises(RewardError, match="10 of its last 15"):
            judging.report(prompts_of(samples(10)))


def test_what_does_not_apply_counts_neither_for_nor_against() -> None:
    made = [*samples(9, category="pair"), *samples(1, category="portrait")]
    with pytest.raises(RewardError, match="1 of its last 1"):
        report_on(made, Reward(raises, wants="portrait"), max_failed=0.5)


def test_a_category_may_have_its_own_weight() -> None:
    made = [*samples(1, category="portrait"), *samples(1, category="pair")]
    report = report_on(made, Reward(), weight=0.25, weight_by_category={"portrait": 2.0})
    assert report.weight.flatten().tolist() == [2.0, 0.25]


def test_a_reward_of_weight_0_is_measured_and_counts_nothing() -> None:
    made = samples(2)
    with Judge(
        [
            WeightedReward(label="counts", at="", model=Reward(), weight=1.0),
            WeightedReward(label="watched", at="", model=Reward(), weight=0.0),
        ],
        max_failed=1.0,
    ) as judging:
        judging.submit(made)
        report = judging.report(prompts_of(made))
    assert report.valid.all()
    assert report.composite.tolist() == [0, 1]
    assert report.weight.tolist() == [[1, 0], [1, 0]]


def test_the_gate_reads_the_prompt_and_nothing_of_the_sample() -> None:
    seen: list[object] = []

    class Gated(Reward):
        def applies(self, prompt: Prompt) -> bool:
            seen.append(prompt)
            return True

    report_on(samples(3), Gated())
    assert seen
    assert all(isinstance(thing, Prompt) for thing in seen)


def test_submitting_returns_while_the_rewards_still_work() -> None:
    free, begun = threading.Event(), threading.Event()

    def wait(shown: Sequence[Sample]) -> Scores:
        begun.set()
        assert free.wait(10)
        return by_seed(shown)

    with judge(Reward(wait)) as judging:
        judging.submit(samples(2))
        assert begun.wait(10)  # it is at work, and here the next batch could be drawn
        free.set()
        assert judging.report(prompts_of(samples(2))).valid.all()


def test_rewards_work_side_by_side() -> None:
    together = threading.Barrier(2, timeout=10)

    def meet(shown: Sequence[Sample]) -> Scores:
        together.wait()
        return by_seed(shown)

    assert report_on(samples(1), Reward(meet), Reward(meet)).valid.all()


def test_without_rewards_nothing_is_submitted() -> None:
    with judge() as judging:
        judging.submit(samples(2))
        assert judging.rewards == ()
