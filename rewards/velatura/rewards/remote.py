"""The reward `http`: pictures are scored behind an address, in batches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from pydantic import Field, field_validator
from torch import Tensor

from velatura.api import Context, Options, Prompt, RewardModel, Sample, Scores, Status, VelaturaError
from velatura.core.errors import suggest
from velatura.core.fingerprint import options_fingerprint
from velatura.core.wire import SCHEMA, VERSION, Answer, Entry, Malformed, read_answer, request_for
from velatura.rewards.judge.pictures import data_url, to_picture
from velatura.rewards.transport import Exchange, Unanswered, bearer, checked_address, finished, new_client

if TYPE_CHECKING:
    import httpx2


class HttpOptions(Options):
    """Where the server is, what it calls the reward, and how patiently it is asked."""

    server: str = Field(description="Address that pictures are posted to, like `http://localhost:8188`.")
    reward: str = Field(min_length=1, description="What the server calls the reward.")
    version: str | None = Field(
        None, description="Version of the reward that must answer; null takes the one that answers first."
    )
    batch_size: int = Field(16, ge=1, description="Most pictures in one request.")
    concurrency: int = Field(4, ge=1, description="Most requests before the server at a time.")
    timeout: float = Field(60, gt=0, description="Seconds for one request.")
    retries: int = Field(3, ge=0, description="How often a request is repeated that the server did not answer well.")
    backoff: float = Field(
        0.5, ge=0, description="Seconds before the first repetition; doubled each time, less a random half at most."
    )
    deadline: float = Field(300, gt=0, description="Seconds for one batch with all its requests.")
    token_env: str | None = Field(None, description="Environment variable that holds the server's token.")
    max_pixels: int | None = Field(
        None, ge=1024, description="Larger pictures are scaled down to this many pixels before they are sent."
    )
    needs_card: bool = Field(
        False, description="Whether a judge or a learned reward answers there: then training on it needs a reward card."
    )

    @field_validator("server")
    @classmethod
    def _is_address(cls, server: str) -> str:
        return checked_address(server, "http://localhost:8188")


class Http(RewardModel[HttpOptions]):
    """What a server says of pictures; higher is better, on the server's scale.

    Posts pictures as lossless PNG files of 8 bits with prompt, category, sources and metadata as JSON; `velatura
    serve-reward` is such a server. What is no finite number becomes a status with its reason: no answer, a broken or
    foreign answer, another number of scores, a value that is none.
    """

    name = "http"
    cached = True
    operational = frozenset({
        "server", "batch_size", "concurrency", "timeout", "retries", "backoff", "deadline", "token_env", "needs_card",
    })  # fmt: skip
    _version: str | None = None
    """Of the reward that answers; None where the server does not say."""
    _unnamed: str | None = None
    """Where a reward of no version answered."""

    def setup(self, context: Context) -> None:
        """Ask the server what it serves, and for the score of a grey picture.

        Raises:
            VelaturaError: nobody answers, or the server wants another token, name, version or batch.
        """
        self._version = self.options.version
        finished(self._check())

    def needs_card(self) -> bool:
        """What the recipe says of it: from here nobody can see what answers."""
        return self.options.needs_card

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B], whatever range the server has."""
        entries = finished(self._entries(samples))
        return Scores(
            values=torch.tensor([entry.value for entry in entries], dtype=torch.float32),
            status=tuple(entry.status for entry in entries),
            reasons=tuple(entry.reason for entry in entries),
            notes=tuple(entry.note for entry in entries),
        )

    def fingerprint(self, context: Context) -> str:
        """Changes with the name, the version that answers, and the size of what is sent; where the server says no
        version, its address stands for one, from `setup` on."""
        return f"{options_fingerprint(self, context)}-{self._version or self.options.version or self._unnamed}"

    async def _check(self) -> None:
        options = self.options
        async with self._client() as client:
            exchange = self._exchange(client)
            self._compare(await _described(client, options.server))
            grey = torch.linspace(0.25, 0.75, 64).expand(3, 64, 64)
            prompt = Prompt(id="check", text="a grey gradient", task="t2i")
            try:
                async with asyncio.timeout(options.deadline):
                    answer = await self._answer(exchange, [Sample(prompt=prompt, image=grey, seed=0)])
            except (Unanswered, TimeoutError) as error:
                said = str(error) or f"no answer within {options.deadline:g} s"
                raise VelaturaError(
                    f"reward 'http' cannot ask for {options.reward!r}: {said}.{self._hint(error)}"
                ) from error
        self._version = self._version or answer.reward_version
        self._unnamed = None if self._version else options.server
        (entry,) = answer.entries
        if entry.status is Status.FAILED:
            logger.warning(
                "reward {!r} at {} failed on a grey picture: {}", options.reward, options.server, entry.reason
            )
        logger.info("reward {!r} at {}, version {}", options.reward, options.server, self._version or "not said")

    def _hint(self, error: Exception) -> str:
        """What to do about it."""
        if isinstance(error, Unanswered) and error.dead:
            return f" Start the server at {self.options.server}, or mend `server`."
        return " Compare `server`, `reward`, `version` and `token_env` with what the server says."

    def _compare(self, served: dict[str, Any]) -> None:
        """With what the server says of itself, where it says something."""
        options = self.options
        if not served:
            return
        if served.get("version") != VERSION:
            raise VelaturaError(f"{options.server} speaks version {served.get('version')} of the schema, not {VERSION}")
        names = [str(reward.get("name")) for reward in served.get("rewards", [])]
        if options.reward not in names:
            raise VelaturaError(
                f"{options.server} serves no reward {options.reward!r}.{suggest(options.reward, names)}"
            )
        most = served.get("limits", {}).get("pictures")
        if isinstance(most, int) and options.batch_size > most:
            raise VelaturaError(
                f"{options.server} takes {most} pictures a request, and `batch_size` is {options.batch_size}. Lower it."
            )

    async def _entries(self, samples: Sequence[Sample]) -> list[Entry]:
        """One for each, in their order; what is no picture is not sent."""
        found: list[Entry | None] = [_flaw(sample) for sample in samples]
        sent = [i for i, entry in enumerate(found) if entry is None]
        size = self.options.batch_size
        parts = [sent[start : start + size] for start in range(0, len(sent), size)]
        async with self._client() as client:
            exchange = self._exchange(client)
            answers = await asyncio.gather(*(self._in_time(exchange, [samples[i] for i in part]) for part in parts))
        for part, entries in zip(parts, answers, strict=True):
            for i, entry in zip(part, entries, strict=True):
                found[i] = entry
        return [entry for entry in found if entry is not None]

    async def _in_time(self, exchange: Exchange, samples: Sequence[Sample]) -> Sequence[Entry]:
        """Entries for a batch, whatever happens; its time begins when it is its turn."""
        async with exchange.slots:
            try:
                async with asyncio.timeout(self.options.deadline):
                    return (await self._answer(exchange, samples)).entries
            except TimeoutError:
                reason = f"no score within the deadline of {self.options.deadline:g} s"
            except Unanswered as error:
                reason = str(error)
        return [Entry(status=Status.FAILED, reason=reason)] * len(samples)

    async def _answer(self, exchange: Exchange, samples: Sequence[Sample]) -> Answer:
        body = await asyncio.to_thread(request_for, self.options.reward, samples, self._url)
        who = f"reward '{self.options.reward}'"
        return await exchange.patiently(lambda: self._once(exchange, body, len(samples)), who)

    async def _once(self, exchange: Exchange, body: dict[str, Any], count: int) -> Answer:
        """One request."""
        response = await exchange.post(self.options.server, body)
        if response.status_code != 200:
            raise exchange.refusal(response)
        try:
            answer = read_answer(response.content, self.options.reward, count)
        except Malformed as error:
            raise Unanswered(f"{self.options.server}: {error}", passing=True) from error
        if self._version is not None and answer.reward_version != self._version:
            other = answer.reward_version or "none"
            raise Unanswered(
                f"{self.options.server} answered with version {other} of {self.options.reward!r}, not {self._version}: "
                f"scores of two versions are not comparable",
                passing=False,
            )
        return answer

    def _url(self, image: Tensor) -> str:
        return data_url(to_picture(image, self.options.max_pixels))

    def _client(self) -> httpx2.AsyncClient:
        options = self.options
        return new_client(options.server, bearer(options.token_env, "token_env"), options.timeout, options.concurrency)

    def _exchange(self, client: httpx2.AsyncClient) -> Exchange:
        return Exchange(client, self.options.server, self.options, asyncio.Semaphore(self.options.concurrency))


async def _described(client: httpx2.AsyncClient, server: str) -> dict[str, Any]:
    """What the server says of itself to a GET; nothing where it does not know this."""
    import httpx2

    try:
        answer = await client.get(server)
        data = json.loads(answer.content)
    except (httpx2.HTTPError, ValueError):
        return {}
    return data if isinstance(data, dict) and data.get("schema") == SCHEMA else {}


def _flaw(sample: Sample) -> Entry | None:
    """Why a picture, or a source of it, cannot be sent."""
    for what, image in (("the picture", sample.image), *(("a source", source) for source in sample.prompt.sources)):
        if image.ndim != 3 or image.shape[0] != 3:
            return Entry(status=Status.FAILED, reason=f"{what} has shape {list(image.shape)}, not 3 x height x width")
        if not bool(torch.isfinite(image).all()):
            return Entry(status=Status.FAILED, reason=f"{what} holds values that are not finite")
    return None
