"""Three answers in ten of a reward server go wrong, each in its own way: no advantage is made of any of them."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from velatura.api import Context, Prompt, RewardReport, Sample, Status
from velatura.core.errors import RewardError
from velatura.core.judge import Judge, WeightedReward
from velatura.core.reward_settings import Breaker
from velatura.rewards.advantages import GroupZ
from velatura.rewards.remote import Http, HttpOptions

GROUPS, G = 8, 8
COUNT = GROUPS * G
Answer = tuple[int, bytes]
TIMEOUT = 4.0
"""Seconds; far more than an answer takes on a busy machine."""


def answered(*entries: Any, **more: Any) -> Answer:
    known = {"version": 1, "reward": "bright", "reward_version": "v1"}
    return 200, json.dumps({**known, "scores": list(entries), **more}).encode()


def slow(value: float) -> Answer:
    time.sleep(TIMEOUT + 1)
    return answered({"value": value})


FAULTS: dict[str, Callable[[float], Answer]] = {
    "error": lambda value: (400, b"CUDA out of memory"),
    "time-out": slow,
    "malformed": lambda value: (200, b'{"scores": [{"val'),
    "refusal": lambda value: answered({"status": "refused", "reason": "I cannot rate this"}),
    "nan": lambda value: answered({"value": float("nan")}),
    "wrong length": lambda value: answered({"value": value}, {"value": value}),
    "another reward": lambda value: answered({"value": value}, reward="dark"),
    "another version": lambda value: answered({"value": value}, reward_version="v2"),
    "no number": lambda value: answered({"value": "0.7"}),
    "busy": lambda value: (503, b""),
}


def samples() -> list[Sample]:
    """Pictures of different brightness, `G` for each prompt, dark and light in every group."""
    made = []
    for i in range(COUNT):
        prompt = Prompt(id=f"p/{i % GROUPS}", text="a wall", task="t2i")
        made.append(Sample(prompt=prompt, image=torch.full((3, 8, 8), i / (COUNT - 1)), seed=i, group=i % GROUPS))
    return sorted(made, key=lambda sample: sample.group)


def injected() -> dict[int, str]:
    """Picture -> fault, of 30 % of them."""
    chosen = random.Random(6).sample(range(COUNT), round(0.3 * COUNT))
    return {picture: list(FAULTS)[i % len(FAULTS)] for i, picture in enumerate(chosen)}


class Server:
    """Brightness of the one picture of a request, except where a fault is injected; answers until it is closed."""

    def __init__(self) -> None:
        self.faults: dict[int, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, body: Any) -> Answer:
        (picture,) = body["pictures"]
        with Image.open(io.BytesIO(base64.b64decode(picture["image"].partition(",")[2]))) as image:
            value = float(np.asarray(image).mean()) / 255
        fault = self.faults.get(round(value * (COUNT - 1)))
        return FAULTS[fault](value) if fault else answered({"value": value})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(404, b"")

            def do_POST(self) -> None:
                self._send(*outer.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

            def _send(self, code: int, body: bytes) -> None:
                try:
                    self.send_response(code)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the reward did not wait

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def asking(server: Server, **options: Any) -> Http:
    """The reward, set up while all is well."""
    given = {"server": server.address, "reward": "bright", "batch_size": 1, "concurrency": 8, "retries": 0,
             "timeout": TIMEOUT, "backoff": 0.001}  # fmt: skip
    made = Http(HttpOptions.model_validate(given | options))
    made.setup(Context(device=torch.device("cpu"), cache=Path(), seed=0, base=Path()))
    return made


def weighted(model: Http, **care: Any) -> WeightedReward:
    return WeightedReward(label="remote", at="recipe.yaml:9: stages.teacher.rewards.0", model=model, **care)


def reported(judging: Judge, own: list[Sample]) -> RewardReport:
    judging.submit(own)
    return judging.report(list({sample.group: sample.prompt for sample in own}.values()))


def test_no_advantage_is_made_of_a_failure_and_none_of_a_group_with_too_few_scores(server: Server) -> None:
    own, faults = samples(), injected()
    assert set(faults.values()) == set(FAULTS)
    model = asking(server)
    server.faults = faults
    with Judge([weighted(model)], max_failed=1.0, retries=1) as judging:
        report = reported(judging, own)
    failed = torch.tensor([sample.seed in faults for sample in own])
    assert torch.equal(~report.valid[:, 0], failed)
    statuses = [Status(status) for status in report.status[:, 0].tolist()]
    wrong = {faults[s.seed]: status for s, status in zip(own, statuses, strict=True) if status is not Status.OK}
    assert wrong == {name: Status.REFUSED if name == "refusal" else Status.FAILED for name in FAULTS}
    assert all(bool(reason) == bool(bad) for reason, bad in zip(report.reasons[0], failed.tolist(), strict=True))

    spoilt = report.scores.clone()
    spoilt[~report.valid] = 1e6
    other = RewardReport(
        names=report.names, scores=spoilt, status=report.status, weight=report.weight, group=report.group,
        prompts=report.prompts,
    )  # fmt: skip
    advantages = GroupZ().estimate(report)
    assert torch.equal(advantages.values, GroupZ().estimate(other).values)
    truth = torch.tensor([round(s.seed / (COUNT - 1) * 255) / 255 for s in own])
    dropped = 0
    for group in range(GROUPS):
        rows = torch.nonzero(report.group == group).flatten()
        good = rows[~failed[rows]]
        enough = len(good) >= 0.75 * G
        dropped += not enough
        assert advantages.valid[rows].tolist() == [enough and not bad for bad in failed[rows].tolist()]
        expected = torch.zeros(len(rows))
        if enough:
            expected[~failed[rows]] = (truth[good] - truth[good].mean()) / truth[good].std(correction=0)
        torch.testing.assert_close(advantages.values[rows], expected, rtol=0, atol=1e-4)
    assert 0 < dropped < GROUPS
    assert advantages.metrics["dropped_groups"] == pytest.approx(dropped / GROUPS)


def test_above_the_budget_the_run_stops_and_names_the_reward(server: Server) -> None:
    model = asking(server)
    server.faults = {picture: fault if fault != "time-out" else "error" for picture, fault in injected().items()}
    with Judge([weighted(model)], max_failed=0.05, retries=0) as judging, pytest.raises(RewardError) as error:
        reported(judging, samples())
    said = "recipe.yaml:9: stages.teacher.rewards.0: reward 'remote' gave no score for 19 of its last 64 samples"
    assert str(error.value).startswith(said)
    assert "the budget `max_failed` is 5%" in str(error.value)


def test_a_server_that_dies_costs_no_made_up_score_and_is_left_alone() -> None:
    own, server = samples(), Server()
    model = asking(server)
    judging = Judge([weighted(model, breaker=Breaker(after=8))], max_failed=1.0, retries=0)
    assert reported(judging, own[:G]).valid.all()
    server.close()
    with judging:
        dead = reported(judging, own)
        assert (dead.status == int(Status.FAILED)).all()
        assert not GroupZ().estimate(dead).valid.any()
        assert all("not asked: " in reason for reason in reported(judging, own).reasons[0])
    with Judge([weighted(model)], max_failed=0.05, retries=0) as judging, pytest.raises(RewardError, match="'remote'"):
        reported(judging, own)
