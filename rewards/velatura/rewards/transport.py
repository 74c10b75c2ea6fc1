"""How rewards talk to a server over HTTP: a client for each call, repetitions with growing, random pauses, a token.

Shared by the judges behind a server and by the reward `http`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

from loguru import logger

from velatura.api import VelaturaError

if TYPE_CHECKING:
    import httpx2

LONGEST_PAUSE = 30.0
"""Seconds; a server that asks for more is not waited for longer."""
PASSING = (408, 409, 425, 429)
"""Answers that may be better next time, beside all from 500."""
T = TypeVar("T")


class Unanswered(Exception):
    """A request brought no reply."""

    def __init__(self, reason: str, *, passing: bool, dead: bool = False, after: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        """Whether it is worth trying again."""
        self.dead = dead
        """Whether nobody listens at the address."""
        self.after = after
        """Seconds that the server asks to wait."""


class Patience(Protocol):
    """How long and how often a server is asked."""

    @property
    def timeout(self) -> float:
        """Seconds for one request."""

    @property
    def retries(self) -> int:
        """How often a request is repeated."""

    @property
    def backoff(self) -> float:
        """Seconds before the first repetition; doubled each time, less a random half at most."""


@dataclass(slots=True)
class Exchange:
    """What the requests of one call share."""

    client: httpx2.AsyncClient
    server: str
    """The address, for messages."""
    patience: Patience
    slots: asyncio.Semaphore
    """How many are under way at a time."""
    dead: str = ""
    """Why nothing more is sent: one request has tried to the end and found nobody."""
    jitter: random.Random = field(default_factory=random.Random)
    """Seeded by the system: its draws only spread repetitions over time."""

    async def patiently(self, once: Callable[[], Awaitable[T]], who: str) -> T:
        """What `once` brings, after as many repetitions as are allowed.

        Raises:
            Unanswered: it brought nothing.
        """
        for attempt in range(1 + self.patience.retries):
            if self.dead:
                raise Unanswered(self.dead, passing=True, dead=True)
            try:
                return await once()
            except Unanswered as error:
                last = attempt == self.patience.retries
                if last and error.dead:
                    self.dead = str(error)
                if last or not error.passing:
                    raise
                pause = max(error.after, self.patience.backoff * 2**attempt * self.jitter.uniform(0.5, 1))
                logger.debug("{}, attempt {}: {}", who, attempt + 1, error)
            await asyncio.sleep(min(pause, LONGEST_PAUSE))
        raise AssertionError("the last attempt returns or raises")

    async def post(self, url: str, body: Any) -> httpx2.Response:
        """One request, whatever the status of its answer.

        Raises:
            Unanswered: there is none.
        """
        import httpx2

        timeout = self.patience.timeout
        try:
            async with asyncio.timeout(timeout):
                return await self.client.post(url, json=body)
        except (TimeoutError, httpx2.TimeoutException) as error:
            dead = isinstance(error, httpx2.ConnectTimeout)
            reason = f"no answer from {self.server} within {timeout:g} s"
            raise Unanswered(reason, passing=True, dead=dead) from error
        except httpx2.TransportError as error:
            said = str(error) or type(error).__name__
            dead = isinstance(error, httpx2.ConnectError)
            raise Unanswered(f"no answer from {self.server}: {said}", passing=True, dead=dead) from error

    def refusal(self, answer: httpx2.Response) -> Unanswered:
        """What an answer with an error status means."""
        code, wait = answer.status_code, answer.headers.get("retry-after", "")
        return Unanswered(
            f"{self.server} answered with status {code}: {said_in(answer)}",
            passing=code >= 500 or code in PASSING,
            after=float(wait) if wait.isdecimal() else 0.0,
        )


def said_in(answer: httpx2.Response) -> str:
    """The reason in the body of an answer, in a line."""
    try:
        reason = json.loads(answer.text)["reason"]
    except (ValueError, KeyError, TypeError):
        reason = answer.text
    return " ".join(str(reason).split())[:300]


def new_client(server: str, headers: Mapping[str, str], timeout: float, connections: int) -> httpx2.AsyncClient:
    """A client for one call: no connection outlives it. What is on this machine is asked without a proxy."""
    import httpx2

    host = urlsplit(server).hostname
    limits = httpx2.Limits(max_connections=connections)
    trust_env = host not in ("localhost", "127.0.0.1", "::1")
    return httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=trust_env)


def bearer(variable: str | None, option: str) -> dict[str, str]:
    """The header with the secret in an environment variable, which `option` of a recipe names.

    Raises:
        VelaturaError: the environment has no such variable.
    """
    if variable is None:
        return {}
    secret = os.environ.get(variable, "")
    if not secret:
        raise VelaturaError(f"the environment has no {variable}, which `{option}` names. Set it to the server's key.")
    return {"Authorization": f"Bearer {secret}"}


def checked_address(server: str, example: str) -> str:
    """The address of a server, without a slash at its end.

    Raises:
        ValueError: it is none.
    """
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{server!r} is no address; write it like {example}")
    return server.rstrip("/")


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Finish asynchronous work in a thread of its own: the caller's may have a loop that runs, as in a notebook."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="velatura-http") as thread:
        return thread.submit(asyncio.run, work).result()
