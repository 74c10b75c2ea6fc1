"""Rewards over HTTP: our own server and reward with each other, each against a broken other side, on real sockets."""

from __future__ import annotations

import base64
import io
import json
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from loguru import logger
from PIL import Image
from torch import Tensor

from velatura.api import Context, NoOptions, Prompt, RewardModel, Sample, Scores, Status, VelaturaError
from velatura.core.served import Served
from velatura.core.serving import Limits, RewardServer
from velatura.rewards.judge.pictures import data_url, to_picture
from velatura.rewards.remote import Http, HttpOptions

Make = Callable[..., Any]
GOOD = {"version": 1, "reward": "bright"}


class Bright(RewardModel[NoOptions]):
    """Mean brightness; remembers what it was shown. A prompt can ask for each status, and for an exception."""

    name = "bright"

    def __init__(self, options: NoOptions | None = None) -> None:
        super().__init__(options)
        self.shown: list[list[Sample]] = []
        self.threads: set[str] = set()
        self.pause = 0.0

    def applies(self, prompt: Prompt) -> bool:
        if prompt.category == "odd":
            raise ValueError("a category that nobody knows")
        return prompt.category != "other"

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.shown.append(list(samples))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.pause)
        if any(sample.prompt.text == "raise" for sample in samples):
            raise ValueError("no such thing")
        said = {"refuse": Status.REFUSED, "fail": Status.FAILED, "skip": Status.NOT_APPLICABLE}
        status = tuple(said.get(sample.prompt.text, Status.OK) for sample in samples)
        return Scores(
            values=torch.stack([sample.image.mean() for sample in samples]), status=status,
            reasons=tuple("" if s is Status.OK else f"it is {s.name}" for s in status),
            notes=tuple(f"seed {sample.seed}" for sample in samples),
        )  # fmt: skip


@pytest.fixture
def model() -> Bright:
    return Bright()


@pytest.fixture
def serve(model: Bright) -> Iterator[Make]:
    """Our server, with `model` behind it, until the test ends."""
    with ExitStack() as stack:

        def start(*, token: str | None = None, version: str = "v1", **limits: int) -> RewardServer:
            served = Served(label="bright", use="bright", summary="Mean brightness.", version=version, model=model)
            return stack.enter_context(RewardServer([served], port=0, token=token, limits=Limits(**limits)))

        yield start


@pytest.fixture
def answering() -> Iterator[Make]:
    """A server of somebody else's, which answers every POST as it is told; its address."""
    with ExitStack() as stack:

        def start(answer: Callable[[int, Any], tuple[int, bytes]]) -> str:
            asked: list[Any] = []

            class Handler(BaseHTTPRequestHandler):
                protocol_version = "HTTP/1.1"

                def do_GET(self) -> None:
                    self._send(404, b"nothing here")

                def do_POST(self) -> None:
                    asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                    self._send(*answer(len(asked) - 1, asked[-1]))

                def _send(self, code: int, body: bytes) -> None:
                    self.send_response(code)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *_: object) -> None:
                    pass

            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield start


@pytest.fixture
def reward(tmp_path: Path) -> Make:
    """The reward `http`, set up; quick to repeat."""

    def make(server: str, **options: Any) -> Http:
        made = Http(HttpOptions.model_validate({"server": server, "reward": "bright", "backoff": 0.001} | options))
        made.setup(Context(device=torch.device("cpu"), cache=tmp_path, seed=0, base=tmp_path))
        return made

    return make


def eight_bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)) / 255


def samples(*texts: str, **prompt: Any) -> list[Sample]:
    return [
        Sample(prompt=Prompt(id=text, text=text, task="t2i", **prompt), image=eight_bits(3, 6, 9, seed=i), seed=i)
        for i, text in enumerate(texts)
    ]


def scored(values: Sequence[Any], **more: Any) -> tuple[int, bytes]:
    return 200, json.dumps(
        GOOD | {"scores": [v if isinstance(v, dict) else {"value": v} for v in values]} | more
    ).encode()


def test_scores_over_http_are_those_of_the_reward_in_process(serve: Make, reward: Make, model: Bright) -> None:
    shown = samples(*"abcdefg")
    asked = reward(serve().address, batch_size=3)
    over = asked.score(shown)
    inside = model.score(shown)
    assert over.status == inside.status
    assert torch.equal(over.values, inside.values)
    assert over.notes == inside.notes


def test_picture_prompt_category_sources_and_plain_metadata_arrive(serve: Make, reward: Make, model: Bright) -> None:
    source, image = eight_bits(3, 5, 7, seed=1), eight_bits(3, 4, 8, seed=2)
    prompt = Prompt(
        id="p/1", text="make it « rötlich »", task="edit", category="hair", sources=(source, source), size=(4, 8),
        metadata={"words": ["a", 1], "object": object()},
    )  # fmt: skip
    reward(serve().address).score([Sample(prompt=prompt, image=image, seed=2**60, group=3)])
    (sample,) = model.shown[-1]
    got = sample.prompt
    assert (got.id, got.text, got.task, got.category, got.size) == (
        prompt.id, prompt.text, prompt.task, prompt.category, prompt.size
    )  # fmt: skip
    assert got.metadata == {"words": ["a", 1]}
    assert sample.seed == 2**60
    assert torch.equal(sample.image, image)
    assert len(got.sources) == 2
    assert all(torch.equal(arrived, source) for arrived in got.sources)


def test_statuses_travel_with_their_reasons_and_an_exception_fails_its_picture_alone(
    serve: Make, reward: Make, model: Bright
) -> None:
    shown = samples("a", "refuse", "fail", "skip", "raise")
    scores = reward(serve().address).score(shown)
    assert scores.status == (Status.OK, Status.REFUSED, Status.FAILED, Status.NOT_APPLICABLE, Status.FAILED)
    assert scores.reasons[1:] == ("it is REFUSED", "it is FAILED", "it is NOT_APPLICABLE", "ValueError: no such thing")


def test_bad_metadata_fail_their_own_request_in_a_batch_of_several(serve: Make, reward: Make, model: Bright) -> None:
    """Four requests wait behind a slow one and are scored together; two of them say nothing that makes sense."""
    asked = reward(serve(batch=16).address, batch_size=1, concurrency=8)
    model.pause = 0.3
    rows = [*samples("first", "b"), *samples("c", metadata={"categories": "no"}), *samples("d"),
            *samples("e", category="odd"), *samples("f")]  # fmt: skip
    scores = asked.score(rows)
    assert max(map(len, model.shown)) > 1
    assert [status is Status.OK for status in scores.status] == [True, True, False, True, False, True]
    assert "metadata `categories` is 'no'" in scores.reasons[2]
    assert scores.reasons[4] == "ValueError: a category that nobody knows"
    assert torch.equal(scores.values[[1, 3, 5]], torch.stack([rows[i].image.mean() for i in (1, 3, 5)]))


def test_what_a_reward_does_not_apply_to_is_not_applicable(serve: Make, reward: Make, model: Bright) -> None:
    asked = reward(serve().address)
    model.shown.clear()
    assert asked.score(samples("a", category="other")).status == (Status.NOT_APPLICABLE,)
    assert model.shown == []


def test_a_picture_that_is_not_finite_is_never_sent(serve: Make, reward: Make, model: Bright) -> None:
    shown = samples("a", "b", "c")
    shown[1].image[0, 0, 0] = torch.inf
    scores = reward(serve().address).score(shown)
    assert scores.status == (Status.OK, Status.FAILED, Status.OK)
    assert "not finite" in scores.reasons[1]
    assert scores.values[2] == shown[2].image.mean()


def test_requests_are_bounded_and_those_that_wait_are_scored_together(serve: Make, reward: Make, model: Bright) -> None:
    asked = reward(serve(batch=8).address, batch_size=2, concurrency=8)
    model.shown.clear()
    model.pause = 0.1
    shown = samples(*map(str, range(16)))
    scores = asked.score(shown)
    assert torch.equal(scores.values, torch.stack([sample.image.mean() for sample in shown]))
    sizes = [len(batch) for batch in model.shown]
    assert sum(sizes) == 16
    assert max(sizes) <= 8
    assert len(sizes) < 8  # eight requests, fewer calls
    assert len(model.threads) == 1


def test_a_request_larger_than_the_models_batch_is_cut(serve: Make, reward: Make, model: Bright) -> None:
    asked = reward(serve(batch=3).address, batch_size=7)
    model.shown.clear()
    asked.score(samples(*"abcdefg"))
    assert [len(batch) for batch in model.shown] == [3, 3, 1]


def test_the_server_says_what_it_serves(serve: Make) -> None:
    said = httpx2.get(serve().address).json()
    assert (said["schema"], said["version"]) == ("velatura-reward", 1)
    assert said["rewards"] == [{"name": "bright", "use": "bright", "version": "v1", "summary": "Mean brightness."}]
    assert said["limits"] == {"bytes": 2**28, "pictures": 64, "batch": 16}


@pytest.mark.parametrize(
    ("limits", "options", "said"),
    [
        ({}, {"reward": "brihgt"}, "serves no reward 'brihgt'. Did you mean 'bright'"),
        ({"pictures": 8}, {}, "takes 8 pictures a request, and `batch_size` is 16"),
        ({}, {"version": "v0"}, "answered with version v1 of 'bright', not v0"),
        ({"token": "secret"}, {}, "status 401: this server wants a token"),
        ({"token": "secret"}, {"token_env": "WRONG"}, "status 401: this token is not the server's"),
        ({"token": "secret"}, {"token_env": "GONE"}, "the environment has no GONE, which `token_env` names"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_said_at_setup(
    serve: Make, reward: Make, monkeypatch: pytest.MonkeyPatch, limits: Any, options: Any, said: str
) -> None:
    monkeypatch.setenv("WRONG", "secrets")
    with pytest.raises(VelaturaError, match=said.replace("(", r"\(")):
        reward(serve(**limits).address, **options)


def test_the_right_token_opens(serve: Make, reward: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIGHT", "secret")
    server = serve(token="secret")
    assert reward(server.address, token_env="RIGHT").score(samples("a")).status == (Status.OK,)
    assert httpx2.get(server.address).status_code == 401
    assert httpx2.get(server.address, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert httpx2.get(server.address, headers=[(b"Authorization", b"Bearer \xff")]).status_code == 401


def test_nobody_at_the_address_is_said_at_setup_and_a_status_later(serve: Make, reward: Make, model: Bright) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(VelaturaError, match="Start the server at"):
            reward(f"http://127.0.0.1:{taken.getsockname()[1]}")
    served = Served(label="bright", use="bright", summary="", version="v1", model=model)
    with RewardServer([served], port=0) as server:
        asked = reward(server.address, batch_size=1, concurrency=1, retries=1)
    begin = time.monotonic()
    scores = asked.score(samples(*"abcdef"))
    assert scores.status == (Status.FAILED,) * 6
    assert all("no answer from" in reason for reason in scores.reasons)
    assert time.monotonic() - begin < 10


def good_first(then: tuple[int, bytes] | Callable[[int], tuple[int, bytes]]) -> Callable[[int, Any], tuple[int, bytes]]:
    """The question of `setup` is answered well."""

    def answer(number: int, body: Any) -> tuple[int, bytes]:
        if number == 0:
            return scored([0.5])
        return then(number) if callable(then) else then

    return answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (scored([0.1]), "the answer has 1 scores for 2 pictures"),
        (scored([0.1, 0.2, 0.3]), "the answer has 3 scores for 2 pictures"),
        (scored([0.1, 0.2], reward="dark"), "reward 'dark' answered in place of 'bright'"),
        (scored([0.1, 0.2], version=2), "version 2 of the schema, not 1"),
        ((200, b'{"scores": [{"val'), "the answer is no JSON"),
        ((200, b'{"score": [1, 2]}'), "no list `scores`"),
        ((200, b"[" * 100_000), "the answer is no JSON"),
        ((500, b'{"reason": "CUDA error"}'), "answered with status 500: CUDA error"),
        ((400, b"what?"), "answered with status 400: what?"),
        ((200, pickle.dumps({"scores": [1.0, 1.0]})), "the answer is no JSON"),
    ],
    ids=lambda given: given[:40] if isinstance(given, str) else None,
)
def test_a_broken_or_foreign_answer_fails_all_pictures_of_its_request(
    answering: Make, reward: Make, answer: tuple[int, bytes], said: str
) -> None:
    scores = reward(answering(good_first(answer)), retries=1).score(samples("a", "b"))
    assert scores.status == (Status.FAILED, Status.FAILED)
    assert said in scores.reasons[0]


@pytest.mark.parametrize(
    ("entry", "status", "said"),
    [
        ({"value": float("nan")}, Status.FAILED, "value is nan, not a finite one"),
        ({"value": float("inf")}, Status.FAILED, "not a finite one"),
        ({"value": 1e39}, Status.FAILED, "not a finite one"),
        ({"value": 10**400}, Status.FAILED, "not a finite one"),
        ({"value": "0.7"}, Status.FAILED, "value is '0.7', no number"),
        ({"value": True}, Status.FAILED, "value is True, no number"),
        ({"value": None}, Status.FAILED, "value is None, no number"),
        ({}, Status.FAILED, "value is None, no number"),
        ({"status": "fine"}, Status.FAILED, "status is 'fine', none of ok, failed, refused, not_applicable"),
        ({"status": ["ok"], "value": 1}, Status.FAILED, "none of ok"),
        ({"status": "refused", "reason": "nudity"}, Status.REFUSED, "nudity"),
        ({"status": "not_applicable"}, Status.NOT_APPLICABLE, "no reason"),
        ({"status": "failed", "value": 0.7}, Status.FAILED, "no reason"),
        ({"status": "ok", "value": 0.7}, Status.OK, ""),
    ],
    ids=str,
)  # fmt: skip
def test_an_odd_entry_is_a_status_of_its_picture_alone(
    answering: Make, reward: Make, entry: Mapping[str, Any], status: Status, said: str
) -> None:
    scores = reward(answering(good_first(scored([dict(entry), 0.25])))).score(samples("a", "b"))
    assert scores.status == (status, Status.OK)
    assert said in scores.reasons[0]
    assert scores.values[1] == 0.25
    assert bool(torch.isfinite(scores.values).all())


def test_what_passes_is_asked_again(answering: Make, reward: Make) -> None:
    faults = [(503, b""), (429, b""), (200, b"{"), scored([0.5, 0.75])]
    scores = reward(answering(good_first(lambda number: faults[number - 1]))).score(samples("a", "b"))
    assert (scores.status, scores.values.tolist()) == ((Status.OK, Status.OK), [0.5, 0.75])


def test_what_does_not_pass_is_not_asked_again(answering: Make, reward: Make) -> None:
    numbers: list[int] = []

    def refuse(number: int) -> tuple[int, bytes]:
        numbers.append(number)
        return 401, b"no"

    reward(answering(good_first(refuse))).score(samples("a"))
    assert numbers == [1]


def test_a_slow_server_is_a_failure_in_time(serve: Make, reward: Make, model: Bright) -> None:
    asked = reward(serve().address, timeout=0.2, retries=0)
    model.pause = 1.0
    begin = time.monotonic()
    (reason,) = asked.score(samples("a")).reasons
    assert reason.endswith("within 0.2 s")
    assert time.monotonic() - begin < 0.9


def test_a_reward_that_changes_behind_its_address_gives_no_score(answering: Make, reward: Make) -> None:
    def answer(number: int, body: Any) -> tuple[int, bytes]:
        return scored([0.5], reward_version="v1" if number < 2 else "v2")

    asked = reward(answering(answer))
    assert asked.score(samples("a")).status == (Status.OK,)
    scores = asked.score(samples("a"))
    assert scores.status == (Status.FAILED,)
    assert "answered with version v2 of 'bright', not v1" in scores.reasons[0]


def body(**change: Any) -> dict[str, Any]:
    picture = {"prompt": 0, "image": data_url(to_picture(eight_bits(3, 4, 4), None))}
    return {
        "version": 1, "reward": "bright", "prompts": [{"id": "p", "text": "a"}], "pictures": [picture]
    } | change  # fmt: skip


def png(mode: str, size: tuple[int, int]) -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def jpeg() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def pictured(url: str) -> dict[str, Any]:
    return body(pictures=[{"prompt": 0, "image": url}])


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (body(version=2), 422, "version 2 of the schema; this server knows 1"),
        (body(reward="brihgt"), 404, "Did you mean 'bright'"),
        (body(extra=1), 422, "extra"),
        (body(pictures=[{"prompt": 1, "image": "x"}]), 422, "there are only 1 prompts"),
        (body(pictures=[{"prompt": -1, "image": "x"}]), 422, "pictures.0.prompt"),
        (body(pictures=body()["pictures"] * 5), 413, "5 pictures and 0 sources; each may be 4 at most"),
        (body(prompts=[{"id": "p", "text": "a", "sources": ["x"] * 5}]), 413, "5 sources"),
        (pictured("http://169.254.169.254/"), 422, "pictures.0.image: a picture is written as data:image/png"),
        (pictured("data:image/png;base64,!!!"), 422, "no PNG"),
        (pictured("data:image/png;base64,AAAA"), 422, "no PNG"),
        (pictured(jpeg()), 422, "no PNG"),
        (pictured(png("RGB", (4, 4))[:-40]), 422, "no PNG"),
        (pictured(png("I;16", (4, 4))), 422, "8 bits for each channel"),
        (pictured(png("1", (8192, 8192))), 422, "33554432 pixels at most"),
        ([1], 422, "valid"),
        (b"{", 422, "no JSON"),
        (b"[" * 100_000, 422, "no JSON"),
        (pickle.dumps(body()), 422, "no JSON"),
        (b" " * 20_001, 413, "20001 bytes; it may have 20000 at most"),
    ],
    ids=lambda given: given[:30] if isinstance(given, str) else None,
)  # fmt: skip
def test_a_bad_request_is_answered_with_its_reason_and_the_model_sees_nothing(
    serve: Make, model: Bright, sent: Any, code: int, said: str
) -> None:
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    limits = {"pictures": 4} | ({"bytes": 20_000} if b"    " in content else {})
    server = serve(**limits)
    answer = httpx2.post(server.address, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["status"]) == (code, "failed")
    assert said in answer.json()["reason"]
    assert model.shown == []
    assert httpx2.post(server.address, json=body()).json()["scores"][0]["value"] == eight_bits(3, 4, 4).mean()


def test_a_large_body_is_refused_before_it_is_read_and_its_sender_reads_why(serve: Make) -> None:
    answer = httpx2.post(serve(bytes=1000).address, json={"x": "y" * 5_000_000})
    assert (answer.status_code, answer.json()["status"]) == (413, "failed")


def test_other_kinds_places_and_lengths_are_refused(serve: Make) -> None:
    address = serve().address
    assert httpx2.post(address, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx2.post(f"{address}/score", json=body()).status_code == 404
    assert httpx2.get(f"{address}/../etc/passwd").status_code == 404
    kind = {"Content-Type": "application/json"}
    assert httpx2.post(address, content=iter([b"{}"]), headers=kind).status_code == 411  # chunked


def test_more_requests_than_allowed_are_told_to_come_again_and_do(serve: Make, reward: Make, model: Bright) -> None:
    server = serve(requests=1)
    asked = reward(server.address, batch_size=1, concurrency=4, retries=20)
    model.pause = 0.02
    begin = threading.Thread(target=lambda: httpx2.post(server.address, json=body()))
    begin.start()
    scores = asked.score(samples(*"abcd"))
    begin.join()
    assert scores.status == (Status.OK,) * 4


def test_a_port_that_is_taken_is_said(serve: Make, model: Bright) -> None:
    port = int(serve().address.rpartition(":")[2])
    with pytest.raises(VelaturaError, match=f"cannot listen at 127.0.0.1:{port}.*Choose another --port"):
        RewardServer([], port=port)


def test_a_picture_that_a_png_cannot_hold_says_so() -> None:
    """The server's tensors are exactly those of the client, rounded to 8 bits."""
    image = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    picture = np.asarray(to_picture(image, None))
    assert np.abs(picture / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("server", ["localhost:8188", "ftp://x", "http://"])
def test_an_address_that_is_none(server: str) -> None:
    with pytest.raises(ValueError, match="is no address; write it like http://localhost:8188"):
        HttpOptions(server=server, reward="x")


def test_a_reward_that_fails_on_the_grey_picture_is_warned_about(answering: Make, reward: Make) -> None:
    said: list[str] = []
    number = logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
    try:
        reward(answering(lambda number, body: scored([{"status": "failed", "reason": "no weights"}])))
    finally:
        logger.remove(number)
    assert "failed on a grey picture: no weights" in "".join(said)


def test_the_word_that_it_needs_a_card_changes_no_kept_score() -> None:
    context = Context(device=torch.device("cpu"), cache=Path(), seed=0, base=Path())
    given = {"server": "http://localhost:1", "reward": "r"}
    plain, opinion, other = (
        Http(HttpOptions.model_validate(given | own)).fingerprint(context)
        for own in ({}, {"needs_card": True}, {"max_pixels": 4096})
    )
    assert plain == opinion != other
