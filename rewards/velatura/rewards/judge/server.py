"""A judge behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, or somebody's API."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loguru import logger
from torch import Tensor

from velatura.api import Usage, VelaturaError
from velatura.core.errors import suggest
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.pictures import data_url, to_picture
from velatura.rewards.judge.replies import LabelsError, Malformed, Reply, parsed, reading, stated
from velatura.rewards.judge.rubric import Question, Rubric
from velatura.rewards.judge.scoring import Verdict, failed, mean_of
from velatura.rewards.transport import Exchange, Unanswered, bearer, finished, new_client, said_in

if TYPE_CHECKING:
    import httpx2

LAST_LINE_TOKENS = 32
"""Room for the line with the score."""
TEMPERATURE = 0.7
"""Of replies that are averaged; with one reply, or with probabilities, it is 0."""
Message = dict[str, Any]


class NoLogprobs(Unanswered):
    """The server takes no request for probabilities."""


@dataclass(slots=True)
class ServerJudge:
    """Asks one model behind one address about pictures, several at a time, each with a deadline."""

    options: VlmJudgeOptions
    rubric: Rubric
    has_logprobs: bool | None = None
    """Whether the server gives probabilities; None until its first reply."""
    usage: Usage | None = None
    """Tokens of all replies so far, repeated ones among them; None while the server has not said."""

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question, in their order."""
        return finished(self._verdicts(questions))

    def check(self, question: Question) -> None:
        """Ask a first question, so that what cannot work is said before the first picture of the run.

        Raises:
            VelaturaError: nobody answers, or the server wants another key, name or request.
        """
        finished(self._check(question))

    async def _check(self, question: Question) -> None:
        async with self._client() as client:
            batch = self._exchange(client, 1)
            try:
                async with asyncio.timeout(self.options.deadline):
                    await self._verdict(batch, question)
            except Unanswered as error:
                if error.passing and not error.dead:
                    logger.warning("judge '{}' did not answer its first question: {}", self.rubric.name, error)
                    return
                hint = await self._hint(client, error)
                raise VelaturaError(f"the judge '{self.rubric.name}' cannot be asked: {error}.{hint}") from error
            except TimeoutError:
                logger.warning("judge '{}' did not answer its first question in time", self.rubric.name)

    async def _hint(self, client: httpx2.AsyncClient, error: Unanswered) -> str:
        """What to do about it."""
        import httpx2

        if error.dead:
            return f" Start the server at {self.options.server}, or mend `server`."
        try:
            answer = (await client.get(f"{self.options.server}/models")).json()
            known = [str(entry["id"]) for entry in answer["data"]]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return " Compare `server`, `model` and `api_key_env` with what the server says; `server` often ends in /v1."
        model = self.options.model
        return "" if model in known or not known else f" The server lists no {model!r}.{suggest(model, known)}"

    async def _verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        async with self._client() as client:
            batch = self._exchange(client, self.options.concurrency)
            return await asyncio.gather(*(self._in_time(batch, question) for question in questions))

    async def _in_time(self, batch: Exchange, question: Question) -> Verdict:
        """A verdict on one question, whatever happens; its time begins when it is its turn."""
        async with batch.slots:
            try:
                async with asyncio.timeout(self.options.deadline):
                    return await self._verdict(batch, question)
            except TimeoutError:
                return failed(f"no score within the deadline of {self.options.deadline:g} s")
            except Unanswered as error:
                return failed(str(error))
            except (ValueError, LabelsError) as error:
                return failed(str(error))

    async def _verdict(self, batch: Exchange, question: Question) -> Verdict:
        messages = [{"role": "user", "content": await asyncio.to_thread(self._content, question)}]
        if self._averages:
            return await self._averaged(batch, messages)
        tokens = self.options.reasoning_tokens + LAST_LINE_TOKENS
        try:
            reply = await self._ask(batch, messages, tokens)
        except NoLogprobs:
            return await self._averaged(batch, messages)
        self._learn(reply)
        if self._averages:
            return await self._averaged(batch, messages)
        if reply.states_no_score and reply.text.strip():
            reply = await self._last_line(batch, messages, reply)
        return reading(reply, self.rubric, self.options.min_mass)

    async def _last_line(self, batch: Exchange, messages: list[Message], reply: Reply) -> Reply:
        """Ask for the line with the score alone, after a reply that ended, or was cut off, without."""
        more = [
            *messages,
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": self.rubric.last_line},
        ]
        return (await self._ask(batch, more, LAST_LINE_TOKENS)).from_its_score_on

    async def _averaged(self, batch: Exchange, messages: list[Message]) -> Verdict:
        """The mean of several written scores, for servers without probabilities."""
        tokens, many = self.options.reasoning_tokens + LAST_LINE_TOKENS, self.options.samples > 1
        verdicts = []
        for seed in range(self.options.samples):
            sampling = {"temperature": TEMPERATURE if many else 0, "seed": seed, "logprobs": None, "top_logprobs": None}
            reply = await self._ask(batch, messages, tokens, sampling)
            if reply.states_no_score and reply.text.strip():
                reply = await self._last_line(batch, messages, reply)
            verdicts.append(stated(reply, self.rubric))
        return mean_of(verdicts)

    @property
    def _averages(self) -> bool:
        """Whether scores are means of written levels."""
        return self.has_logprobs is False

    def _learn(self, reply: Reply) -> None:
        """Find out from the first reply with text whether there are probabilities."""
        if self.has_logprobs is not None or reply.refusal or not reply.text.strip():
            return
        if reply.tokens is None:
            self._say_that_levels_are_averaged("its replies have none")
        else:
            self.has_logprobs = True

    def _say_that_levels_are_averaged(self, why: str) -> None:
        """Once."""
        if self.has_logprobs is None:
            self.has_logprobs = False
            logger.warning(
                "judge '{}': {} gives no logprobs ({}), so a score is the mean of the levels that {} replies state, "
                "not an expectation. vLLM and SGLang give them.",
                self.rubric.name, self.options.server, why, self.options.samples,
            )  # fmt: skip

    def _content(self, question: Question) -> list[Message]:
        """The question as the parts of a message, pictures as lossless PNG."""
        made: list[Message] = []
        for part in question:
            if isinstance(part, Tensor):
                url = data_url(to_picture(part, self.options.max_pixels))
                made.append({"type": "image_url", "image_url": {"url": url}})
            else:
                made.append({"type": "text", "text": part})
        return made

    async def _ask(
        self, batch: Exchange, messages: Sequence[Message], tokens: int, sampling: Message | None = None
    ) -> Reply:
        """A reply, after as many repetitions as are allowed."""
        body = {"model": self.options.model, "messages": messages, "max_tokens": tokens, "temperature": 0,
                "logprobs": True, "top_logprobs": 20} | (sampling or {}) | self.options.request  # fmt: skip
        body = {name: value for name, value in body.items() if value is not None}
        return await batch.patiently(lambda: self._once(batch, body), f"judge '{self.rubric.name}'")

    async def _once(self, batch: Exchange, body: Message) -> Reply:
        """One request."""
        answer = await batch.post(f"{self.options.server}/chat/completions", body)
        if answer.status_code != 200:
            raise self._refused(batch, answer)
        try:
            reply = parsed(answer.content)
        except Malformed as error:
            raise Unanswered(str(error), passing=True) from error
        if reply.usage is not None:
            self.usage = (self.usage or Usage()) + reply.usage
        return self._from_the_right_model(reply)

    def _refused(self, batch: Exchange, answer: httpx2.Response) -> Unanswered:
        """An answer with an error status."""
        refusal = batch.refusal(answer)
        if answer.status_code in (400, 422) and "logprobs" in str(refusal) and not self.has_logprobs:
            self._say_that_levels_are_averaged(said_in(answer))
            return NoLogprobs(str(refusal), passing=False)
        return refusal

    def _from_the_right_model(self, reply: Reply) -> Reply:
        """The reply, if the model that was asked gave it."""
        wanted = self.options.served_as or self.options.model
        if reply.model != wanted and reply.model.partition("@")[0] != wanted:  # `transformers serve` adds @revision
            raise Unanswered(
                f"{self.options.server} answered for model {reply.model!r}, not for {wanted!r} (if they are the "
                f"same, set `served_as`)",
                passing=False,
            )
        return reply

    def _client(self) -> httpx2.AsyncClient:
        """A client for one call."""
        headers = bearer(self.options.api_key_env, "api_key_env")
        return new_client(str(self.options.server), headers, self.options.timeout, self.options.concurrency)

    def _exchange(self, client: httpx2.AsyncClient, at_once: int) -> Exchange:
        return Exchange(client, str(self.options.server), self.options, asyncio.Semaphore(at_once))
