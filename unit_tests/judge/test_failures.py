"""Three answers in ten go wrong, each in its own way, over a real socket: no advantage is made of any of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import chat_server as serving
import pytest
import torch
from chat_server import ChatServer, Question, Raw, completion, expectation, probabilities, scored

from velatura.api import Prompt, RewardReport, Sample, Status
from velatura.core.errors import RewardError
from velatura.core.judge import Judge, WeightedReward
from velatura.core.reward_settings import Breaker
from velatura.rewards.advantages import GroupZ

Make = Callable[..., Any]
GROUPS, G = 8, 8
COUNT = GROUPS * G
NAN = {level: math.nan for level in "12345"}
FAULTS: dict[str, Callable[[Question], Raw]] = {
    "error": lambda q: Raw(b"CUDA out of memory", status=400),
    "time-out": lambda q: Raw(serving.by_brightness(q).body, delay=6.0),
    "malformed": lambda q: Raw(b'{"choices": [{"mess'),
    "refusal": lambda q: completion(["I", " cannot", " help", " with", " that", "."], {"5": 0.9}, at=0),
    "nan": lambda q: Raw(
        scored(probabilities(q.brightness)).body.replace(b'"logprob": -', b'"logprob": NaN, "was": -')
    ),
    "wrong length": lambda q: Raw(
        scored(probabilities(q.brightness)).body.replace(b'"choices": [', b'"choices": [{}, ')
    ),
    "another model": lambda q: Raw(serving.by_brightness(q).body.replace(b"judge-8b", b"another-8b")),
    "no level": lambda q: completion(["Score", ":", " [", "9", "]"], {"9": 0.9}),
}


def samples() -> list[Sample]:
    """Pictures of different brightness, `G` for each prompt, dark and light in every group."""
    made = []
    for i in range(COUNT):
        prompt = Prompt(id=f"p/{i % GROUPS}", text="a wall", task="t2i", category="even" if i % 2 == 0 else "odd")
        made.append(Sample(prompt=prompt, image=torch.full((3, 8, 8), i / (COUNT - 1)), seed=i, group=i % GROUPS))
    return sorted(made, key=lambda sample: sample.group)


def number(question: Question) -> int:
    """Which picture it is about."""
    return round(question.brightness * (COUNT - 1))


def injected() -> dict[int, str]:
    """Picture -> fault, of 30 % of them."""
    draw = random.Random(6)
    chosen = draw.sample(range(COUNT), round(0.3 * COUNT))
    return {picture: list(FAULTS)[i % len(FAULTS)] for i, picture in enumerate(chosen)}


def reported(judging: Judge, own: list[Sample]) -> RewardReport:
    judging.submit(own)
    return judging.report(list({sample.group: sample.prompt for sample in own}.values()))


def weighted(model: Any, **care: Any) -> WeightedReward:
    return WeightedReward(label="alignment", at="recipe.yaml:9: stages.teacher.rewards.0", model=model, **care)


@pytest.fixture
def faulty(serve: Make, judge: Make) -> Callable[[], Any]:
    """A judge whose server fails on 30 % of the pictures, whatever is tried."""
    faults = injected()

    def make() -> Any:
        server = serve()
        made = judge(server, timeout=3, retries=0, deadline=60, concurrency=8)
        server.behaviour = lambda q: FAULTS[faults[number(q)]](q) if number(q) in faults else serving.by_brightness(q)
        return made

    return make


def test_no_advantage_is_made_of_a_failure_and_none_of_a_group_with_too_few_scores(faulty: Callable[[], Any]) -> None:
    own, faults = samples(), injected()
    with Judge([weighted(faulty())], max_failed=1.0, retries=1) as judging:
        report = reported(judging, own)
    failed = torch.tensor([sample.seed in faults for sample in own])
    assert set(faults.values()) == set(FAULTS)
    assert torch.equal(~report.valid[:, 0], failed)
    statuses = [Status(status) for status in report.status[:, 0].tolist()]
    wrong = {faults[s.seed]: status for s, status in zip(own, statuses, strict=True) if status is not Status.OK}
    assert wrong == {name: Status.REFUSED if name == "refusal" else Status.FAILED for name in FAULTS}
    assert all(bool(reason) == bool(bad) for reason, bad in zip(report.reasons[0], failed.tolist(), strict=True))

    advantages = GroupZ().estimate(report)
    assert not advantages.valid[failed].any()
    assert (advantages.values[failed] == 0).all()
    truth = torch.tensor([expectation(round(s.seed / (COUNT - 1) * 255) / 255) for s in own])
    dropped = 0
    for group in range(GROUPS):
        rows = torch.nonzero(report.group == group).flatten()
        good = rows[~failed[rows]]
        if len(good) < 0.75 * G:
            dropped += 1
            assert not advantages.valid[rows].any()
            assert (advantages.values[rows] == 0).all()
            continue
        z = (truth[good] - truth[good].mean()) / truth[good].std(correction=0)
        torch.testing.assert_close(advantages.values[good], z, rtol=0, atol=1e-3)
    assert 0 < dropped < GROUPS
    assert advantages.metrics["dropped_groups"] == pytest.approx(dropped / GROUPS)


def test_whatever_number_a_failure_carries_the_advantages_are_the_same(faulty: Callable[[], Any]) -> None:
    with Judge([weighted(faulty())], max_failed=1.0, retries=0) as judging:
        report = reported(judging, samples())
    spoilt = report.scores.clone()
    spoilt[~report.valid] = 1e6
    clean, other = GroupZ().estimate(report), GroupZ().estimate(RewardReport(
        names=report.names, scores=spoilt, status=report.status, weight=report.weight, group=report.group,
        prompts=report.prompts,
    ))  # fmt: skip
    assert torch.equal(clean.values, other.values)
    assert torch.equal(clean.valid, other.valid)


def test_above_the_budget_the_run_stops_and_names_the_reward(faulty: Callable[[], Any]) -> None:
    with Judge([weighted(faulty())], max_failed=0.05, retries=0) as judging, pytest.raises(RewardError) as error:
        reported(judging, samples())
    said = str(error.value)
    assert said.startswith(
        "recipe.yaml:9: stages.teacher.rewards.0: reward 'alignment' gave no score for 19 of its last 64"
    )
    assert "the budget `max_failed` is 5%" in said


def test_a_server_that_dies_costs_no_made_up_score_and_little_time(judge: Make) -> None:
    own = samples()
    with ChatServer() as server:
        model = judge(server, retries=0, timeout=2)
        judging = Judge([weighted(model, breaker=Breaker(after=8))], max_failed=1.0, retries=0)
        assert reported(judging, own[:G]).valid.all()
    with judging:
        dead = reported(judging, own)
        assert (dead.status == int(Status.FAILED)).all()
        assert not GroupZ().estimate(dead).valid.any()
        again = reported(judging, own)
        assert all("not asked: " in reason for reason in again.reasons[0])
    with (
        Judge([weighted(model)], max_failed=0.05, retries=0) as judging,
        pytest.raises(RewardError, match="'alignment'"),
    ):
        reported(judging, own)
