"""The cache of scores, the circuit breaker and the golden set: what a reward says, and how it is looked after."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from velatura.api import NoOptions, Prompt, RewardModel, Sample, Scores, Status, VelaturaError
from velatura.core.errors import RewardError
from velatura.core.golden import GoldenSet
from velatura.core.judge import Judge, WeightedReward
from velatura.core.reward_settings import Breaker, Golden
from velatura.core.score_cache import ScoreCache

Answer = Callable[[Sequence[Sample]], Scores]


def brightness(shown: Sequence[Sample]) -> Scores:
    return Scores.of(torch.stack([sample.image.mean() for sample in shown]))


class Reward(RewardModel[NoOptions]):
    """Scores by brightness, or as it is told, and counts what it is shown."""

    name = "reward"

    def __init__(self, answer: Answer = brightness, scope: str = "sample") -> None:
        super().__init__()
        self.answer, self.scope = answer, scope  # type: ignore[misc]
        self.shown: list[int] = []

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.shown.append(len(samples))
        return self.answer(samples)


def pictures(*levels: float, **prompt: Any) -> list[Sample]:
    asked = Prompt(**({"id": "p", "text": "grey", "task": "t2i"} | prompt))
    return [Sample(prompt=asked, image=torch.full((3, 4, 4), level), seed=i) for i, level in enumerate(levels)]


def judged(model: Reward, samples: Sequence[Sample], **options: Any) -> Any:
    with judge(model, **options) as judging:
        judging.submit(samples)
        return judging.report([samples[0].prompt])


def judge(model: Reward, max_failed: float = 1.0, retries: int = 0, **options: Any) -> Judge:
    reward = WeightedReward(label="r", at="stages.a.rewards.0", model=model, **options)
    return Judge([reward], max_failed=max_failed, retries=retries)


# --- cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path / "scores.sqlite", "fingerprint")


def test_a_picture_that_was_scored_is_not_judged_again(cache: ScoreCache) -> None:
    model = Reward(lambda shown: replace(brightness(shown), notes=("it is grey",) * len(shown)))
    first = judged(model, pictures(0.1, 1 / 3), cache=cache)
    again = judged(model, pictures(1 / 3, 0.1, 0.9), cache=cache)
    assert model.shown == [2, 1]
    assert torch.equal(again.scores[:2, 0], first.scores[:, 0].flip(0))
    assert again.scores[2, 0] == pytest.approx(0.9)
    assert again.notes[0] == ("it is grey",) * 3


@dataclass(frozen=True)
class Scene:
    colour: str


SOURCE = torch.full((3, 4, 4), 0.2)


@pytest.mark.parametrize(
    "change",
    [
        {"text": "grey!"}, {"sources": (SOURCE,)}, {"sources": (SOURCE + 0.01,)}, {"category": "portrait"},
        {"task": "edit"}, {"size": (4, 4)}, {"metadata": {"word": "a"}}, {"metadata": {"word": "b"}},
        {"metadata": {"word": Scene("red")}}, {"metadata": {"word": Scene("blue")}},
    ],
)  # fmt: skip
def test_another_prompt_or_source_is_another_question(cache: ScoreCache, change: dict[str, Any]) -> None:
    model = Reward()
    for known in ({}, {"sources": (SOURCE + 0.02,)}, {"metadata": {"word": "c"}}, {"metadata": {"word": Scene("c")}}):
        judged(model, pictures(0.5, **known), cache=cache)
    judged(model, pictures(0.5, **change), cache=cache)
    assert model.shown == [1] * 5
    judged(model, pictures(0.5, **change), cache=cache)
    assert model.shown == [1] * 5


def test_a_mask_that_metadata_name_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    """Of folders, and of texts that name no file, nothing is read."""
    model, mask = Reward(), tmp_path / "mask.png"
    cache = ScoreCache(tmp_path / "scores.sqlite", "fingerprint", tmp_path)
    shown = pictures(0.5, metadata={"edit_region": "mask.png", "text": ["OPEN", "."]})
    for content, calls in ((b"one", 1), (b"one", 1), (b"another", 2), (b"another", 2)):
        if not mask.exists() or mask.read_bytes() != content:
            mask.write_bytes(content)
        judged(model, shown, cache=cache)
        assert len(model.shown) == calls


def test_another_fingerprint_is_another_judge(cache: ScoreCache) -> None:
    model = Reward()
    judged(model, pictures(0.5), cache=cache)
    judged(model, pictures(0.5), cache=ScoreCache(cache.path, "another rubric"))
    assert model.shown == [1, 1]


@pytest.mark.parametrize("status", [Status.FAILED, Status.REFUSED, Status.NOT_APPLICABLE])
def test_only_scores_are_kept(cache: ScoreCache, status: Status) -> None:
    model = Reward(lambda shown: Scores.missing(len(shown), status, "no"))
    judged(model, pictures(0.5), cache=cache)
    report = judged(model, pictures(0.5), cache=cache)
    assert model.shown == [1, 1]
    assert report.status.flatten().tolist() == [status]
    assert report.reasons == (("no",),)


def test_a_further_pass_over_the_same_pictures_is_really_made(cache: ScoreCache) -> None:
    model = Reward()
    for repeat in (0, 1, 1):
        with judge(model, cache=cache) as judging:
            judging.submit(pictures(0.5), repeat)
            judging.report([pictures(0.5)[0].prompt])
    assert model.shown == [1, 1]


def test_a_group_is_known_only_as_a_whole(cache: ScoreCache) -> None:
    model = Reward(scope="group")
    judged(model, pictures(0.1, 0.2), cache=cache)
    judged(model, pictures(0.1, 0.2), cache=cache)
    judged(model, pictures(0.1, 0.3), cache=cache)
    assert model.shown == [2, 2]


def test_what_has_no_content_to_be_known_by_is_judged_each_time(cache: ScoreCache) -> None:
    model = Reward()
    for _ in range(2):
        judged(model, pictures(0.5, metadata={"check": object()}), cache=cache)
    assert model.shown == [1, 1]


def test_a_broken_cache_costs_a_warning_and_no_score(cache: ScoreCache) -> None:
    cache.path.write_bytes(b"no data base" * 100)
    report = judged(Reward(), pictures(0.5), cache=cache)
    assert report.valid.all()


WRITER = """
import sys
from pathlib import Path
import torch
from velatura.api import Prompt, Sample, Scores
from velatura.core.score_cache import ScoreCache
cache, first = ScoreCache(Path(sys.argv[1]), "fingerprint"), int(sys.argv[2])
prompt = Prompt(id="p", text="grey", task="t2i")
for i in range(first, first + 30):
    own = [Sample(prompt=prompt, image=torch.full((3, 4, 4), i / 100), seed=0)]
    cache.keep(cache.keys(own, "sample"), Scores.of(torch.tensor([float(i)])))
"""


def test_several_processes_keep_all_their_scores(cache: ScoreCache) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WRITER, cache.path, str(30 * i)]) for i in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    keys = cache.keys([sample for i in range(60) for sample in pictures(i / 100)], "sample")
    assert [value for value, _ in cache.find(keys).values()] == list(range(60))


# --- breaker ----------------------------------------------------------------------------------------------------


class Flaky:
    """Fails while it is down."""

    def __init__(self) -> None:
        self.down = True

    def __call__(self, shown: Sequence[Sample]) -> Scores:
        if self.down:
            raise ConnectionError("nobody there")
        return brightness(shown)


def test_a_reward_that_keeps_failing_is_left_alone_and_tried_again_with_one_picture() -> None:
    answer, now = Flaky(), [0.0]
    model = Reward(answer)
    judging = judge(model, breaker=Breaker(after=4, cool_down=10))
    judging._askers[0].breaker.clock = lambda: now[0]
    samples = pictures(*[0.5] * 6)

    def status() -> list[int]:
        judging.submit(samples)
        report = judging.report([samples[0].prompt])
        assert all(("not asked: " in why) == (not model.shown) for why in report.reasons[0] if why)
        return [int(one) for one in report.status.flatten()]

    with judging:
        assert status() == [Status.FAILED] * 6
        assert model.shown == [6, 1, 1, 1, 1]
        model.shown.clear()
        assert status() == [Status.FAILED] * 6
        assert model.shown == []
        now[0] = 11.0
        judging.submit(samples)
        assert not judging.report([samples[0].prompt]).valid.any()
        assert model.shown == [1]
        now[0], answer.down = 22.0, False
        assert status() == [Status.OK] * 6
        assert model.shown == [1, 1, 5]


def test_a_refusal_is_an_answer_and_opens_no_breaker() -> None:
    model = Reward(lambda shown: Scores.missing(len(shown), Status.REFUSED, "no"))
    judging = judge(model, breaker=Breaker(after=2))
    with judging:
        for _ in range(3):
            judging.submit(pictures(0.5, 0.5, 0.5))
            judging.report([pictures(0.5)[0].prompt])
    assert model.shown == [3, 3, 3]


def test_failures_of_an_open_breaker_count_against_the_budget() -> None:
    judging = judge(Reward(Flaky()), max_failed=0.05, breaker=Breaker(after=2))
    with (
        judging,
        pytest.raises(RewardError, match=r"stages\.a\.rewards\.0: reward 'r' gave no score for 12 of its last"),
    ):
        judging.submit(pictures(*[0.5] * 12))
        judging.report([pictures(0.5)[0].prompt])


# --- golden set -------------------------------------------------------------------------------------------------

ROWS = [
    {"image": "dark.png", "prompt": "a wall", "high": 0.4},
    {"image": "mid.png", "prompt": "a wall", "low": 0.4, "high": 0.6, "order": "walls", "place": 2},
    {"image": "light.png", "prompt": "a wall", "order": "walls", "place": 1},
]


@pytest.fixture
def golden(tmp_path: Path) -> Callable[..., GoldenSet]:
    def make(rows: Sequence[Any] = ROWS, **settings: Any) -> GoldenSet:
        for name, level in (("dark", 0.2), ("mid", 0.5), ("light", 0.8)):
            Image.new("RGB", (6, 6), (round(255 * level),) * 3).save(tmp_path / f"{name}.png")
        (tmp_path / "golden.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return GoldenSet.load(Golden(file="golden.jsonl", **settings), tmp_path)

    return make


def test_a_judge_that_knows_its_golden_set_may_begin(golden: Callable[..., GoldenSet]) -> None:
    with judge(Reward(), golden=golden()) as judging:
        assert judging.health == {"reward/r/golden": 1.0}


def test_a_judge_upside_down_is_refused_with_the_picture_and_its_score(golden: Callable[..., GoldenSet]) -> None:
    upside_down = Reward(lambda shown: replace(brightness(shown), values=1 - brightness(shown).values))
    with pytest.raises(RewardError, match=r"stages\.a\.rewards\.0: reward 'r' fails its golden set .* 2 of 3") as error:
        judge(upside_down, golden=golden()).__enter__()
    assert "dark.png: 0.8, expected -inf to 0.4" in str(error.value)
    assert "light.png (0.2) is not above mid.png (0.498)" in str(error.value)


def test_some_expectations_may_be_allowed_to_fail(golden: Callable[..., GoldenSet]) -> None:
    upside_down = Reward(lambda shown: replace(brightness(shown), values=1 - brightness(shown).values))
    with judge(upside_down, golden=golden(allowed=0.7)) as judging:
        assert judging.health["reward/r/golden"] == pytest.approx(1 / 3)


def test_a_judge_that_says_nothing_at_the_start_is_no_healthy_one(golden: Callable[..., GoldenSet]) -> None:
    with pytest.raises(RewardError, match="failed: ConnectionError: nobody there"):
        judge(Reward(Flaky()), golden=golden()).__enter__()


def test_a_judge_that_changes_under_the_run_stops_it_when_its_time_comes(golden: Callable[..., GoldenSet]) -> None:
    shift = [0.0]
    model = Reward(lambda shown: replace(brightness(shown), values=brightness(shown).values + shift[0]))
    with judge(model, golden=golden(every=2, max_drift=0.02)) as judging:
        for step in range(2):
            judging.submit(pictures(0.5))
            if step == 0:
                judging.report([pictures(0.5)[0].prompt])
                shift[0] = 0.05
            else:
                with pytest.raises(RewardError, match=r"more than `golden.max_drift` 0\.02 apart"):
                    judging.report([pictures(0.5)[0].prompt])


def test_a_judge_is_also_looked_at_when_so_many_minutes_have_passed(golden: Callable[..., GoldenSet]) -> None:
    now = [0.0]
    model = Reward()
    reward = WeightedReward(label="r", at="here", model=model, golden=golden(every=1000, minutes=30.0))
    with Judge([reward], max_failed=1.0, retries=0, clock=lambda: now[0]) as judging:
        for seconds, checks in ((0, 1), (1799, 1), (1800, 2), (3599, 2), (3600, 3)):
            now[0] = seconds
            judging.submit(pictures(0.5))
            judging.report([pictures(0.5)[0].prompt])
            assert model.shown.count(len(ROWS)) == checks


def test_a_judge_that_is_silent_for_a_while_is_a_matter_of_the_budget(golden: Callable[..., GoldenSet]) -> None:
    answer = Flaky()
    answer.down = False
    with judge(Reward(answer), golden=golden()) as judging:
        answer.down = True
        judging.check_golden()
        assert judging.health == {"reward/r/golden": 1.0}


def test_a_group_reward_gets_the_pictures_of_an_order_together(golden: Callable[..., GoldenSet]) -> None:
    model = Reward(scope="group")
    with judge(model, golden=golden()):
        assert sorted(model.shown) == [1, 2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "dark.png", "prompt": "a"}, "golden.jsonl:1: nothing is expected"),
        ({"image": "dark.png", "prompt": "a", "order": "x"}, "'order' and 'place' go together"),
        ({"image": "none.png", "prompt": "a", "low": 1}, "golden.jsonl:1: there is no picture at"),
        ({"image": "dark.png", "prompt": "a", "hihg": 1}, "hihg: no such key. Did you mean 'high'?"),
    ],
)  # fmt: skip
def test_a_broken_golden_set_is_one_message(golden: Callable[..., GoldenSet], row: dict[str, Any], said: str) -> None:
    with pytest.raises(VelaturaError) as error:
        golden([row])
    assert said in str(error.value)


# --- threads ----------------------------------------------------------------------------------------------------


def test_a_reward_has_cpu_threads_of_its_own_and_takes_none_from_others() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def look(shown: Sequence[Sample]) -> Scores:
        seen.append(torch.get_num_threads())
        return brightness(shown)

    judged(Reward(look), pictures(0.5), threads=before + 2)
    late: list[int] = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (seen, torch.get_num_threads(), late) == ([before + 2], before, [before])
