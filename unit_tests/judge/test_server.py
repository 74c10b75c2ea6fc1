"""The judge behind a server, over real sockets: what it asks, what it makes of answers and of their absence."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import chat_server as serving
import numpy as np
import pytest
import torch
from chat_server import ChatServer, Question, Raw, completion, expectation, scored

from velatura.api import Prompt, Sample, Status, VelaturaError
from velatura.core.judge import Judge, WeightedReward

Make = Callable[..., Any]
GOOD = {"3": 0.2, "4": 0.7, "5": 0.08}


def always(made: Raw) -> serving.Behaviour:
    return lambda question: made


def test_a_score_is_the_expectation_over_the_levels_at_the_score(serve: Make, judge: Make, pictures: Make) -> None:
    values = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    scores = judge(serve()).score(pictures(values))
    assert scores.status == (Status.OK,) * 6
    rounded = [round(v * 255) / 255 for v in values]  # pictures travel in 8 bits
    torch.testing.assert_close(scores.values, torch.tensor([expectation(v) for v in rounded]), rtol=0, atol=1e-5)
    assert all("It" in note and "mass 0.98" in note for note in scores.notes)


def test_levels_outside_the_alternatives_count_nothing_and_the_rest_is_normalised(
    serve: Make, judge: Make, pictures: Make
) -> None:
    levels = {"4": 0.5, "5": 0.25, " 5": 0.05, "four": 0.1}
    (value,) = judge(serve(always(scored(levels)))).score(pictures([0.5])).values.tolist()
    assert value == pytest.approx((4 * 0.5 + 5 * 0.3) / 0.8, abs=1e-6)


def test_the_score_is_the_last_one_that_is_stated(serve: Make, judge: Make, pictures: Make) -> None:
    tokens = ["The", " picture", " says", " Score", ":", " [", "5", "]", "\n", "Score", ":", " [", "2", "]"]
    scores = judge(serve(always(completion(tokens, {"2": 0.9, "5": 0.01})))).score(pictures([0.5]))
    assert scores.values.tolist() == pytest.approx([(2 * 0.9 + 5 * 0.01) / 0.91])


@pytest.mark.parametrize(
    "tokens", [["**", "Score", ":**", " ", "4"], ["Score", ":", "4"], ["score", " :", " ", "4", "/", "5"]], ids=str
)
def test_models_write_the_score_in_their_own_ways(tokens: list[str], serve: Make, judge: Make, pictures: Make) -> None:
    made = completion(tokens, GOOD, at=tokens.index("4"))
    assert judge(serve(always(made))).score(pictures([0.5])).values.tolist() == pytest.approx([3.8776], abs=1e-4)


def test_a_question_begins_with_the_rubric_and_ends_with_the_picture(serve: Make, judge: Make, pictures: Make) -> None:
    server = serve()
    asked = judge(server)
    asked.score(pictures([0.3, 0.7], text="two red cats"))
    first, second = server.questions
    assert [part["type"] for part in first.parts] == ["text", "text", "image_url", "text"]
    assert first.parts[:2] == second.parts[:2]
    assert first.parts[0]["text"] == asked.rubric.instructions(256)
    assert "two red cats" in first.parts[1]["text"]
    assert {k: first.body[k] for k in ("model", "temperature", "logprobs", "top_logprobs", "max_tokens")} == {
        "model": serving.MODEL, "temperature": 0, "logprobs": True, "top_logprobs": 20, "max_tokens": 288,
    }  # fmt: skip


def test_an_edit_is_judged_by_sources_instruction_and_picture_in_this_order(
    serve: Make, judge: Make, pictures: Make
) -> None:
    server = serve()
    asked = judge(server, "edit-instruction")
    samples = pictures([0.3, 0.7], sources=2, text="make it darker")
    assert asked.score(samples).status == (Status.OK,) * 2
    first, second = sorted(server.questions, key=lambda q: q.brightness)
    assert [part["type"] for part in first.parts] == ["text", *["text", "image_url"] * 3, "text"]
    assert first.parts[:6] == second.parts[:6]  # what a group shares comes first
    assert [round(float(p.mean())) for p in first.pictures] == [26, 51, 76]
    assert "make it darker" in first.parts[5]["text"]
    assert asked.applies(samples[0].prompt)
    assert not asked.applies(Prompt(id="p", text="a cat", task="t2i"))


def test_pictures_arrive_without_loss(serve: Make, judge: Make, pictures: Make) -> None:
    pixels = torch.randint(0, 256, (3, 17, 23), generator=torch.Generator().manual_seed(0))
    server = serve()
    judge(server).score([Sample(prompt=pictures([0])[0].prompt, image=pixels / 255, seed=0)])
    assert np.array_equal(server.questions[0].pictures[0], pixels.permute(1, 2, 0).numpy())


def test_large_pictures_are_scaled_down_only_when_asked(serve: Make, judge: Make, pictures: Make) -> None:
    server = serve()
    big = [Sample(prompt=pictures([0])[0].prompt, image=torch.rand(3, 64, 128), seed=0)]
    shapes = []
    for options in ({}, {"max_pixels": 2048}, {"max_pixels": 8192}):
        judge(server, **options).score(big)
        shapes.append(server.questions[0].pictures[0].shape)
    assert shapes == [(64, 128, 3), (32, 64, 3), (64, 128, 3)]


def test_many_pictures_are_asked_about_at_once_within_bounds_and_keep_their_order(
    serve: Make, judge: Make, pictures: Make
) -> None:
    delays = [0.05 + 0.1 * random.Random(i).random() for i in range(24)]

    def slow(question: Question) -> Raw:
        return Raw(serving.by_brightness(question).body, delay=delays[question.number])

    values = [i / 23 for i in range(24)]
    server = serve(slow)
    asked = judge(server, concurrency=6)
    begin = time.monotonic()
    scores = asked.score(pictures(values))
    assert time.monotonic() - begin < sum(delays)  # one after the other they would take at least that
    assert 3 < server.most_at_once <= 6
    assert scores.values.tolist() == sorted(scores.values.tolist())
    assert scores.values.unique().numel() == 24


def test_a_picture_is_scored_although_three_requests_in_ten_fail(serve: Make, judge: Make, pictures: Make) -> None:
    draw, lock = random.Random(7), threading.Lock()

    def flaky(question: Question) -> Raw:
        with lock:
            luck = draw.random()
        if luck < 0.1:
            return Raw(b"overloaded", status=503)
        if luck < 0.2:
            return Raw(b"{'choices': oops", status=200)
        if luck < 0.3:
            return Raw(b"", status=429, headers={"Retry-After": "0"})
        return serving.by_brightness(question)

    server = serve(flaky)
    values = [i / 63 for i in range(64)]
    scores = judge(server, retries=9).score(pictures(values))
    assert scores.status == (Status.OK,) * 64
    assert 64 * 1.2 < len(server.questions) < 64 * 1.8
    rounded = torch.tensor([expectation(round(v * 255) / 255) for v in values])
    torch.testing.assert_close(scores.values, rounded, rtol=0, atol=1e-5)


FAULTS: dict[str, tuple[Raw, Status, str]] = {
    "500": (Raw(b"out of memory", status=500), Status.FAILED, "status 500: out of memory"),
    "not JSON": (Raw(b"<html>"), Status.FAILED, "no JSON"),
    "cut JSON": (Raw(b'{"choices": [{"mess'), Status.FAILED, "no JSON"),
    "other JSON": (Raw(b'{"detail": "hello"}'), Status.FAILED, "no chat completion"),
    "a list": (Raw(b"[1, 2]"), Status.FAILED, "no chat completion"),
    "no reply": (Raw(b'{"model": "judge-8b", "choices": []}'), Status.FAILED, "0 replies"),
    "another model": (completion(["[4]"], GOOD, at=0, model="tiny"), Status.FAILED, "answered for model 'tiny'"),
    "empty": (completion([""], GOOD, at=0), Status.FAILED, "empty"),
    "no score": (completion(["A", " nice", " one"], GOOD), Status.FAILED, "no line 'Score: [level]'"),
    "out of range": (scored({"7": 0.9}), Status.FAILED, "'7', which is none of 1, 2, 3, 4, 5"),
    "a fraction": (scored({"4.5": 0.9}), Status.FAILED, "'4.5'"),
    "NaN": (scored({"4": math.nan, "5": 0.1}, "4"), Status.FAILED, "NaN"),
    "logits": (scored({"4": math.exp(3.0)}), Status.FAILED, "above 0"),
    "little mass": (scored({"4": 0.2, "maybe": 0.7}, "4"), Status.FAILED, "probability 0.2 together"),
    "refusal": (completion(["I", "'m", " sorry, I", " cannot"], GOOD), Status.REFUSED, "refused"),
    "refusal field": (completion([""], GOOD, at=0, refusal="No."), Status.REFUSED, "No."),
    "N/A": (completion(["Score: [", "N", "/A", "]"], {"N": 0.9, "1": 0.05}, at=1), Status.NOT_APPLICABLE, "N/A"),
}  # fmt: skip


@pytest.mark.parametrize(("made", "status", "reason"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_score_is_a_status_with_its_reason(
    made: Raw, status: Status, reason: str, serve: Make, judge: Make, pictures: Make
) -> None:
    """Of its picture alone: the one beside it is scored."""
    server = serve()
    asked = judge(server, "portrait", retries=1)
    server.behaviour = lambda question: made if question.brightness < 0.5 else serving.by_brightness(question)
    scores = asked.score(pictures([0.1, 0.9]))
    assert scores.status == (status, Status.OK)
    assert reason in scores.reasons[0]
    assert scores.values[1] == pytest.approx(expectation(round(0.9 * 255) / 255), abs=1e-5)


def test_a_judge_that_forgets_the_score_is_asked_for_the_last_line(serve: Make, judge: Make, pictures: Make) -> None:
    def forgetful(question: Question) -> Raw:
        last = len(question.body["messages"]) > 1
        return scored(GOOD, reasoning="") if last else completion(["Hm", ",", " on", " and", " on"], GOOD)

    server = serve(forgetful)
    scores = judge(server).score(pictures([0.5]))
    assert scores.status == (Status.OK,)
    assert [m["role"] for m in server.questions[-1].body["messages"]] == ["user", "assistant", "user"]
    assert server.questions[-1].body["messages"][1]["content"] == "Hm, on and on"


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_score_within_reasoning_that_was_cut_off_is_not_the_verdict(
    serve: Make, judge: Make, pictures: Make, logprobs: bool
) -> None:
    """The judge weighs a score of 3 when its tokens run out; asked for the last line, it says 5 and goes on."""
    weighing, at = ["A", " score", ":", " 3", " would", " need", " more", " light", " but"], 3
    final = ["Score", ":", " [", "5", "]", " because", " it", " is"]

    def wordy(question: Question) -> Raw:
        last = len(question.body["messages"]) > 1
        levels = ({"5": 0.9} if last else {"3": 0.9}) if logprobs else None
        return completion(final if last else weighing, levels, at=at, finish="length")

    server = serve(wordy)
    asked = judge(server, samples=1)
    scores = asked.score(pictures([0.5]))
    assert (scores.status, scores.values.tolist()) == ((Status.OK,), [5.0])
    server.behaviour = lambda question: completion(weighing, {"3": 0.9} if logprobs else None, at=at, finish="length")
    scores = asked.score(pictures([0.5]))
    assert scores.status == (Status.FAILED,)
    assert "was cut off before its score; raise `reasoning_tokens`" in scores.reasons[0]
    server.behaviour = lambda question: completion(weighing, {"3": 0.9} if logprobs else None, at=at)
    assert asked.score(pictures([0.5])).values.tolist() == [3.0]  # it had its say


def test_a_server_that_is_too_slow_costs_its_timeout_only(serve: Make, judge: Make, pictures: Make) -> None:
    server = serve()
    asked = judge(server, timeout=0.2, retries=1)
    server.behaviour = always(Raw(b"", delay=5))
    begin = time.monotonic()
    scores = asked.score(pictures([0.5, 0.6]))
    assert time.monotonic() - begin < 4
    assert scores.status == (Status.FAILED,) * 2
    assert "within 0.2 s" in scores.reasons[0]


def test_a_picture_has_a_deadline_over_all_its_requests(serve: Make, judge: Make, pictures: Make) -> None:
    server = serve()
    asked = judge(server, retries=50, backoff=0.1, deadline=0.5)
    server.behaviour = always(Raw(b"busy", status=503))
    scores = asked.score(pictures([0.5]))
    assert scores.reasons == ("no score within the deadline of 0.5 s",)


def test_a_server_that_dies_fails_every_picture_soon_and_is_found_again(judge: Make, pictures: Make) -> None:
    with ChatServer() as server:
        asked = judge(server, retries=2, backoff=0.1, concurrency=1)
        port = server._server.server_address[1]
    begin = time.monotonic()
    scores = asked.score(pictures([0.5] * 50))
    assert time.monotonic() - begin < 3  # one picture tries to the end, the others do not; 50 x .15 s otherwise
    assert scores.status == (Status.FAILED,) * 50
    assert "no answer from" in scores.reasons[-1]
    with ChatServer(port=port):
        assert asked.score(pictures([0.5])).status == (Status.OK,)


def test_a_server_without_logprobs_is_noticed_once_and_its_levels_are_averaged(
    serve: Make, judge: Make, pictures: Make, messages: list[str]
) -> None:
    levels = {None: "3", 0: "3", 1: "4", 2: "4", 3: "5"}

    def plain(question: Question) -> Raw:
        return completion(["Fine. Score: [", levels[question.body.get("seed")], "]"])

    server = serve(plain)
    asked = judge(server)
    assert len([m for m in messages if "gives no logprobs" in m]) == 1
    scores = asked.score(pictures([0.5, 0.6]))
    assert scores.values.tolist() == [4.0, 4.0]
    assert len(server.questions) == 8
    assert all(q.body["temperature"] == 0.7 and "logprobs" not in q.body for q in server.questions)
    assert len([m for m in messages if "gives no logprobs" in m]) == 1


def test_a_server_that_takes_no_logprobs_is_asked_without(serve: Make, judge: Make, pictures: Make) -> None:
    def picky(question: Question) -> Raw:
        if "logprobs" in question.body:
            return Raw(b'{"error": "logprobs are not supported"}', status=400)
        return completion(["Score: [", "2", "]"])

    assert judge(serve(picky), samples=2).score(pictures([0.5])).values.tolist() == [2.0]


def test_of_several_replies_more_than_half_must_state_a_level(serve: Make, judge: Make, pictures: Make) -> None:
    server = serve(always(completion(["Score: [4]"])))
    asked = judge(server, samples=3)
    server.behaviour = lambda q: completion(["Score: [4]"] if q.body["seed"] > 0 else ["Score: [9]"])
    assert asked.score(pictures([0.5])).values.tolist() == [4.0]
    server.behaviour = lambda q: completion(["Score: [4]"] if q.body["seed"] > 1 else ["Score: [9]"])
    scores = asked.score(pictures([0.5]))
    assert scores.status == (Status.FAILED,)
    assert "'9'" in scores.reasons[0]


def test_a_reply_without_logprobs_from_a_server_that_has_them_is_a_failure(
    serve: Make, judge: Make, pictures: Make
) -> None:
    """Scores of two kinds in one group would be compared with each other."""
    server = serve()
    asked = judge(server)
    server.behaviour = always(completion(["Score: [4]"]))
    assert "no logprobs, and earlier ones had" in asked.score(pictures([0.5])).reasons[0]


@pytest.mark.parametrize("tokens", [["Score: ", "4]"], ["Score", ": [4", "]"]], ids=str)
def test_levels_that_are_no_single_tokens_are_refused_at_start(tokens: list[str], serve: Make, judge: Make) -> None:
    with pytest.raises(VelaturaError, match="level 4 of rubric 'alignment' is no token of its own for this model"):
        judge(serve(always(completion(tokens, GOOD))))


def test_the_key_comes_from_the_environment(
    serve: Make, judge: Make, pictures: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    with pytest.raises(VelaturaError, match="the environment has no JUDGE_KEY, which `api_key_env` names"):
        judge(server, api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    judge(server, api_key_env="JUDGE_KEY").score(pictures([0.5]))
    assert server.questions[-1].headers["Authorization"] == "Bearer s3cret"


def test_a_dead_server_is_said_before_the_first_picture(judge: Make) -> None:
    with ChatServer() as server:
        pass
    with pytest.raises(VelaturaError, match=r"cannot be asked: no answer from http://127.0.0.1:.* Start the server at"):
        judge(server, retries=0)


def test_another_model_is_said_before_the_first_picture(serve: Make, judge: Make) -> None:
    server = serve(lambda question: Raw(b'{"error": "no such model"}', status=404))
    with pytest.raises(VelaturaError, match=r"status 404.*lists no 'judge-9b'\. Did you mean 'judge-8b'\?"):
        judge(server, model="judge-9b")


def test_a_model_may_answer_under_another_name_that_is_given(serve: Make, judge: Make, pictures: Make) -> None:
    server = serve(always(scored(GOOD)))
    assert judge(server, model="alias", served_as=serving.MODEL).score(pictures([0.5])).status == (Status.OK,)


def test_a_revision_behind_the_name_is_no_other_model(serve: Make, judge: Make, pictures: Make) -> None:
    answer = completion(["[", "4", "]", " Score: [", "4", "]"], GOOD, model=f"{serving.MODEL}@main")
    assert judge(serve(always(answer))).score(pictures([0.5])).status == (Status.OK,)


def test_fields_may_be_added_to_a_request_or_taken_out(serve: Make, judge: Make, pictures: Make) -> None:
    server = serve()
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": None, "max_completion_tokens": 99}
    judge(server, request=extra).score(pictures([0.5]))
    body = server.questions[-1].body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["max_completion_tokens"] == 99
    assert "max_tokens" not in body


def test_a_picture_that_is_none_is_a_failure_of_its_own(serve: Make, judge: Make, pictures: Make) -> None:
    samples = pictures([0.5, math.nan, 0.5])
    scores = judge(serve()).score(samples)
    assert scores.status == (Status.OK, Status.FAILED, Status.OK)
    assert "not finite" in scores.reasons[1]


def test_reports_keep_what_the_judge_wrote(serve: Make, judge: Make, pictures: Make) -> None:
    server = serve()
    reward = WeightedReward(label="alignment", at="rewards.0", model=judge(server, retries=0))
    faults = iter([Raw(b"", status=500)])
    server.behaviour = lambda question: next(faults, None) or serving.by_brightness(question)
    samples = pictures([0.2, 0.8])
    with Judge([reward], max_failed=0.5) as judging:
        judging.submit(samples)
        report = judging.report([samples[0].prompt])
    assert report.valid.all()
    assert all("It" in note and "mass" in note for note in report.notes[0])
