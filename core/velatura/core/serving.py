"""Rewards behind HTTP: what `velatura serve-reward` runs. It reads JSON and PNG files and nothing else."""

from __future__ import annotations

import hmac
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from loguru import logger

from velatura.core import __version__
from velatura.core.errors import VelaturaError, suggest
from velatura.core.scorer import Scorer
from velatura.core.served import Served
from velatura.core.wire import SCHEMA, VERSION, Malformed, answer_of, read_request, samples_of

PATIENCE = 60.0
"""Seconds that a connection may stand still."""
LINGER_SECONDS, LINGER_BYTES = 2.0, 2**28
"""How long, and how far, a request that was refused is read on, so that its sender gets to read why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for, and how many there may be."""

    bytes: int = 2**28
    """Of a request's body."""
    pictures: int = 64
    """In a request."""
    requests: int = 32
    """Under way at a time; others are told to come again."""
    batch: int = 16
    """Pictures that a model sees at a time."""


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, code: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.code, self.reason, self.headers = code, reason, dict(headers or {})


@dataclass(slots=True)
class RewardServer:
    """Serves until it is closed. Each reward has a thread of its own; connections have theirs."""

    rewards: Sequence[Served]
    host: str = "127.0.0.1"
    port: int = 8188
    token: str | None = None
    limits: Limits = Limits()
    _scorers: dict[str, Scorer] = field(init=False)
    _slots: threading.BoundedSemaphore = field(init=False)
    _server: ThreadingHTTPServer = field(init=False)

    def __post_init__(self) -> None:
        """Listens at once; raises `VelaturaError` where it cannot."""
        self._slots = threading.BoundedSemaphore(self.limits.requests)
        try:
            self._server = _Listener((self.host, self.port), _handler(self))
        except (OSError, OverflowError) as error:
            raise VelaturaError(
                f"cannot listen at {self.host}:{self.port}: {error}. Choose another --port or --host."
            ) from error
        self._scorers = {served.label: Scorer(served, self.limits.batch) for served in self.rewards}

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self._server.server_address[1]}"

    def serve(self) -> None:
        """Answer until `close`, or Ctrl-C."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        for scorer in self._scorers.values():
            scorer.close()

    def __enter__(self) -> Self:
        """Answer in a thread until the block ends."""
        threading.Thread(target=self.serve, name="reward-server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def described(self) -> dict[str, Any]:
        """What GET / says."""
        return {
            "schema": SCHEMA, "version": VERSION, "velatura": __version__,
            "rewards": [
                {"name": s.label, "use": s.use, "version": s.version, "summary": s.summary} for s in self.rewards
            ],
            "limits": {"bytes": self.limits.bytes, "pictures": self.limits.pictures, "batch": self.limits.batch},
        }  # fmt: skip

    def require_token(self, authorization: str) -> None:
        """Refuse who does not know the token; the comparison takes as long for a near miss as for a far one."""
        if self.token is None:
            return
        wanted = f"Bearer {self.token}".encode()
        if not hmac.compare_digest(authorization.encode("utf-8", "surrogateescape"), wanted):
            said = "this token is not the server's" if authorization else "this server wants a token"
            raise Refusal(401, f"{said}; set the environment variable that `token_env` names", {
                "WWW-Authenticate": "Bearer"
            })  # fmt: skip

    def scores(self, body: bytes) -> dict[str, Any]:
        """The answer to a request."""
        try:
            request = read_request(body)
        except Malformed as error:
            raise Refusal(422, str(error)) from error
        scorer = self._scorers.get(request.reward)
        if scorer is None:
            raise Refusal(404, f"there is no reward {request.reward!r} here.{suggest(request.reward, self._scorers)}")
        sources = sum(len(prompt.sources) for prompt in request.prompts)
        most = self.limits.pictures
        if len(request.pictures) > most or sources > most:
            raise Refusal(413, f"{len(request.pictures)} pictures and {sources} sources; each may be {most} at most")
        try:
            samples = samples_of(request)
        except Malformed as error:
            raise Refusal(422, str(error)) from error
        return answer_of(request.reward, scorer.served.version, scorer.submit(samples).result())


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True


def _handler(server: RewardServer) -> type[BaseHTTPRequestHandler]:
    """A handler that knows its server."""

    class Handler(_Handler):
        rewards = server

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "velatura", ""
    timeout = PATIENCE
    rewards: RewardServer

    def do_GET(self) -> None:
        """What is served."""
        self._answer(self.rewards.described)

    def do_POST(self) -> None:
        """Scores."""
        self._answer(self._scores)

    def _answer(self, made: Any) -> None:
        """Whatever happens, the answer is JSON."""
        try:
            self._require_place()
            self.rewards.require_token(self.headers.get("Authorization", ""))
            self._send(200, made())
        except Refusal as refusal:
            self._send(
                refusal.code, {"version": VERSION, "status": "failed", "reason": refusal.reason}, refusal.headers
            )
        except TimeoutError:
            self.close_connection = True
        except Exception as error:
            logger.exception("a request was not answered")
            reason = f"the server made a mistake: {type(error).__name__}"
            self._send(500, {"version": VERSION, "status": "failed", "reason": reason})

    def _require_place(self) -> None:
        if self.path.partition("?")[0] != "/":
            raise Refusal(404, f"there is nothing at {self.path[:80]}; GET and POST go to /")

    def _scores(self) -> dict[str, Any]:
        if not self.rewards._slots.acquire(blocking=False):
            raise Refusal(503, "too many requests are under way; come again", {"Retry-After": "1"})
        try:
            return self.rewards.scores(self._body())
        finally:
            self.rewards._slots.release()

    def _body(self) -> bytes:
        """What was posted, if it may be so large."""
        kind = self.headers.get_content_type()
        if kind != "application/json":
            raise Refusal(415, f"the body is {kind}, not application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refusal(411, "say in Content-Length how long the body is")
        if int(length) > self.rewards.limits.bytes:
            raise Refusal(413, f"the body has {length} bytes; it may have {self.rewards.limits.bytes} at most")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refusal(400, "the body was cut off")
        self._is_read = True
        return body

    def _send(self, code: int, data: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(data, allow_nan=False).encode()
        unread = self.command == "POST" and not getattr(self, "_is_read", False)
        self._is_read = False
        try:
            self.send_response(code)
            given = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
            for name, value in (given | ({"Connection": "close"} if unread else {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            if unread:
                self._linger()
        except OSError:  # nobody waits for it any more
            self.close_connection = True

    def _linger(self) -> None:
        """Read on what the sender still sends: a connection closed before that takes the answer with it."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_SECONDS)
        end, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
        while left > 0 and time.monotonic() < end and (read := self.connection.recv(min(left, 2**20))):
            left -= len(read)

    def log_message(self, format: str, *arguments: Any) -> None:
        """To the log, at a level that is not shown."""
        logger.debug("{}: {}", self.address_string(), format % arguments)
