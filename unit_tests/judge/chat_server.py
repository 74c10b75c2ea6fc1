"""A server of the OpenAI chat interface on a real socket, which answers, or fails, as a test wants."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import numpy as np
from PIL import Image

MODEL = "judge-8b"


@dataclass(frozen=True)
class Question:
    """One request as the server got it."""

    number: int
    """How many came before."""
    body: Mapping[str, Any]
    headers: Mapping[str, str]

    @property
    def parts(self) -> list[Any]:
        return list(self.body["messages"][0]["content"])

    @property
    def pictures(self) -> list[np.ndarray]:
        """[H W 3] uint8 each."""
        urls = [part["image_url"]["url"] for part in self.parts if part["type"] == "image_url"]
        assert all(url.startswith("data:image/png;base64,") for url in urls)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]

    @property
    def brightness(self) -> float:
        """Mean of the last picture, in [0, 1]."""
        return float(self.pictures[-1].mean() / 255)


@dataclass(frozen=True)
class Raw:
    """A response that need not be a good one."""

    body: bytes
    status: int = 200
    delay: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)


Behaviour = Callable[[Question], Raw]


def probabilities(brightness: float) -> dict[str, float]:
    """Of the levels, for a picture: a bell around 1 + 4 b; they sum to .98."""
    weight = {str(level): math.exp(-((level - 1 - 4 * brightness) ** 2)) for level in range(1, 6)}
    return {level: 0.98 * w / sum(weight.values()) for level, w in weight.items()}


def expectation(brightness: float) -> float:
    """The score that such a picture must get."""
    p = probabilities(brightness)
    return sum(int(level) * value for level, value in p.items()) / sum(p.values())


def completion(
    tokens: Sequence[str],
    levels: Mapping[str, float] | None = None,
    *,
    at: int = -2,
    model: str = MODEL,
    finish: str = "stop",
    **message: Any,
) -> Raw:
    """A chat completion; the alternatives of token `at` have the probabilities `levels`."""
    content = [{"token": t, "logprob": -0.1, "top_logprobs": [{"token": t, "logprob": -0.1}]} for t in tokens]
    if levels is not None:
        others = [{"token": t, "logprob": -9999.0 if p == 0 else math.log(p)} for t, p in levels.items()]
        own = next((o["logprob"] for o in others if o["token"] == tokens[at]), -20.0)
        content[at] = {"token": tokens[at], "logprob": own, "top_logprobs": others}
    said = {"role": "assistant", "content": "".join(tokens), **message}
    logprobs = {"content": content} if levels is not None else None
    choice = {"index": 0, "message": said, "finish_reason": finish, "logprobs": logprobs}
    return Raw(json.dumps({"id": "x", "object": "chat.completion", "model": model, "choices": [choice]}).encode())


def scored(levels: Mapping[str, float], answer: str = "", reasoning: str = "It is bright.") -> Raw:
    """Reasoning and a score as Qwen's tokenizer cuts them."""
    answer = answer or max(levels, key=lambda level: levels[level])
    return completion([*reasoning.split(" "), "\n", "Score", ":", " [", answer, "]"], levels)


def by_brightness(question: Question) -> Raw:
    """Brighter is better."""
    return scored(probabilities(question.brightness))


class ChatServer:
    """Serves in threads until the block ends."""

    def __init__(self, behaviour: Behaviour = by_brightness, port: int = 0) -> None:
        self.behaviour = behaviour
        self.questions: list[Question] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, body: bytes, headers: Mapping[str, str]) -> Raw:
        if path == "/v1/models":
            return Raw(json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())
        if path != "/v1/chat/completions":
            return Raw(b'{"detail": "Not Found"}', status=404)
        with self._lock:
            question = Question(len(self.questions), json.loads(body), headers)
            self.questions.append(question)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            made = self.behaviour(question)
            time.sleep(made.delay)
            return made
        finally:
            with self._lock:
                self._at_once -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(outer.answer(self.path, b"", dict(self.headers)))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._send(outer.answer(self.path, body, dict(self.headers)))

            def _send(self, made: Raw) -> None:
                try:
                    self.send_response(made.status)
                    for name, value in {"Content-Length": str(len(made.body)), **made.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(made.body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the judge did not wait

            def log_message(self, *_: object) -> None:
                pass

        return Handler
