"""Asks a vision-language model for text: in this process, or behind an OpenAI-compatible server.

For judges that were trained to write a sheet of scores. `vlm-judge` needs no sheet: it reads probabilities.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from loguru import logger
from PIL import Image
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from velatura.api import Context, Options, Status, Usage, VelaturaError
from velatura.rewards.judge.options import require_fitting_place
from velatura.rewards.judge.pictures import data_url, to_picture
from velatura.rewards.judge.replies import Malformed, parsed
from velatura.rewards.judge.rubric import Question
from velatura.rewards.transport import Exchange, Unanswered, bearer, checked_address, finished, new_client


class ChatOptions(Options):
    """Which model is asked, and where it runs: in this process, or behind `server`."""

    model: str = Field(
        min_length=1,
        description="Without `server` a model folder or a name on the hub; with it the name the server knows.",
    )
    revision: str | None = Field(None, min_length=1, description="Of a model on the hub: branch, tag or commit.")
    server: str | None = Field(
        None, description="Address of an OpenAI-compatible server, like http://localhost:8000/v1."
    )
    tokens: int = Field(512, ge=16, le=32768, description="Most tokens of a reply.")
    max_pixels: int | None = Field(None, ge=1024, description="Larger pictures are scaled down to this many pixels.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the server's key.")
    concurrency: int = Field(32, ge=1, description="Most questions before the server at a time.")
    timeout: float = Field(120, gt=0, description="Seconds for one request.")
    retries: int = Field(3, ge=0, description="How often a request is repeated that the server did not answer well.")
    backoff: float = Field(0.5, ge=0, description="Seconds before the first repetition; doubled each time.")
    deadline: float = Field(600, gt=0, description="Seconds for one question with all its requests.")
    request: dict[str, Any] = Field(default_factory=dict, description="Fields added to each request.")
    served_as: str | None = Field(None, description="What the server's replies call the model, if not `model`.")
    batch_size: int = Field(4, ge=1, description="Questions in one generation of a local model.")
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$", description="Of a local model.")
    device: str | None = Field(None, description="Where a local model lives, like `cuda:1`; null is the run's device.")

    @field_validator("server")
    @classmethod
    def _is_address(cls, server: str | None) -> str | None:
        if server is None:
            return None
        return checked_address(server, "http://localhost:8000/v1").removesuffix("/chat/completions")

    @model_validator(mode="after")
    def _suits_its_place(self) -> Self:
        require_fitting_place(self, self.server, self.request)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question."""

    parts: Question
    """Text and pictures, in this order."""
    system: str | None = None
    """What is said before, in the system's name."""
    sampling: tuple[tuple[str, Any], ...] = ()
    """Fields of the request that differ from a greedy reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What came back: a text, or why there is none."""

    text: str = ""
    status: Status = Status.OK
    reason: str = ""
    is_cut: bool = False
    """Whether the reply ended because it had as many tokens as it may have."""


class Chat(Protocol):
    """Answers questions."""

    @property
    def usage(self) -> Usage | None:
        """Tokens read and written so far; None where a server does not say."""

    def ask(self, questions: Sequence[Asked]) -> list[Written]:
        """One reply per question, in their order."""
        ...


def opened_chat(user: str, options: ChatOptions, context: Context) -> Chat:
    """The model, loaded, or the server, found to be there.

    Raises:
        VelaturaError: it does not open, or nobody answers.
    """
    if options.server is None:
        return LocalChat(options, context)
    chat = ServerChat(user, options)
    (reply,) = chat.ask([Asked(parts=["Say yes."])])
    if reply.status is not Status.OK:
        raise VelaturaError(
            f"the judge of '{user}' cannot be asked: {reply.reason}. Start it, or mend `server`, `model`."
        )
    return chat


class ServerChat:
    """Asks a server, several questions at a time, each with repetitions and a deadline."""

    def __init__(self, user: str, options: ChatOptions) -> None:
        """Nothing is sent yet."""
        self.user, self.options = user, options
        self.usage: Usage | None = None

    def ask(self, questions: Sequence[Asked]) -> list[Written]:
        """One reply per question, in their order."""
        return finished(self._ask(questions))

    async def _ask(self, questions: Sequence[Asked]) -> list[Written]:
        options, headers = self.options, bearer(self.options.api_key_env, "api_key_env")
        slots = asyncio.Semaphore(options.concurrency)
        async with new_client(str(options.server), headers, options.timeout, options.concurrency) as client:
            exchange = Exchange(client, str(options.server), options, slots)
            return await asyncio.gather(*(self._in_time(exchange, question) for question in questions))

    async def _in_time(self, exchange: Exchange, question: Asked) -> Written:
        async with exchange.slots:
            try:
                async with asyncio.timeout(self.options.deadline):
                    body = await asyncio.to_thread(self._body, question)
                    return await exchange.patiently(lambda: self._once(exchange, body), f"judge '{self.user}'")
            except TimeoutError:
                return Written(status=Status.FAILED, reason=f"no reply within {self.options.deadline:g} s")
            except (Unanswered, ValueError) as error:
                return Written(status=Status.FAILED, reason=str(error))

    def _body(self, question: Asked) -> dict[str, Any]:
        """The question as a request, pictures as lossless PNG."""
        content: list[dict[str, Any]] = []
        for part in question.parts:
            if isinstance(part, Tensor):
                url = data_url(to_picture(part, self.options.max_pixels))
                content.append({"type": "image_url", "image_url": {"url": url}})
            else:
                content.append({"type": "text", "text": part})
        said = [] if question.system is None else [{"role": "system", "content": question.system}]
        body = {"model": self.options.model, "messages": [*said, {"role": "user", "content": content}],
                "max_tokens": self.options.tokens, "temperature": 0}  # fmt: skip
        body |= dict(question.sampling) | self.options.request
        return {name: value for name, value in body.items() if value is not None}

    async def _once(self, exchange: Exchange, body: dict[str, Any]) -> Written:
        answer = await exchange.post(f"{self.options.server}/chat/completions", body)
        if answer.status_code != 200:
            raise exchange.refusal(answer)
        try:
            reply = parsed(answer.content)
        except Malformed as error:
            raise Unanswered(str(error), passing=True) from error
        if reply.usage is not None:
            self.usage = (self.usage or Usage()) + reply.usage
        wanted = self.options.served_as or self.options.model
        if reply.model != wanted and reply.model.partition("@")[0] != wanted:
            reason = f"{self.options.server} answered for model {reply.model!r}, not for {wanted!r} (see `served_as`)"
            raise Unanswered(reason, passing=False)
        if reply.refusal:
            return Written(status=Status.REFUSED, reason=reply.refusal)
        return Written(text=reply.text, is_cut=reply.is_cut)


class LocalChat:
    """Asks a model in this process; replies are greedy."""

    def __init__(self, options: ChatOptions, context: Context) -> None:
        """Raises `VelaturaError` where the model does not open."""
        from velatura.rewards.judge.local import shared_model

        folder = context.resolve(options.model)
        device = options.device or str(context.device)
        self.options, self.usage = options, Usage()
        source = str(folder) if folder.is_dir() else options.model
        self.model = shared_model(source, options.revision, options.dtype, device)
        logger.debug("{} writes {} tokens at most", options.model, options.tokens)

    def ask(self, questions: Sequence[Asked]) -> list[Written]:
        """One reply per question, in their order."""
        size = self.options.batch_size
        made: list[Written] = []
        for start in range(0, len(questions), size):
            made += self._replies(questions[start : start + size])
        return made

    def _replies(self, questions: Sequence[Asked]) -> list[Written]:
        import transformers

        rows = [self._row(question) for question in questions]
        settings: Any = transformers.GenerationConfig
        net, processor = self.model.net, self.model.processor
        own = net.generation_config.eos_token_id
        ends = own if own is not None else self.model.tokenizer.eos_token_id
        config = settings(
            max_new_tokens=self.options.tokens, do_sample=False, pad_token_id=self.model.tokenizer.pad_token_id,
            eos_token_id=ends,
        )  # fmt: skip
        with self.model.lock, torch.inference_mode():
            processor.tokenizer.padding_side = "left"
            pictures = [shown for _, shown in rows]
            batch = processor(
                text=[text for text, _ in rows], images=pictures if any(pictures) else None, padding=True,
                return_tensors="pt",
            )  # fmt: skip
            moved = {
                n: v.to(net.device, net.dtype) if v.is_floating_point() else v.to(net.device) for n, v in batch.items()
            }
            made = net.generate(**moved, generation_config=config)[:, moved["input_ids"].shape[1] :]
        lengths = lengths_of(made, ends)
        self.usage += Usage(prompt=int(batch["attention_mask"].sum()), completion=sum(length for length, _ in lengths))
        texts = processor.batch_decode(made, skip_special_tokens=True)
        return [Written(text=str(text), is_cut=not ended) for text, (_, ended) in zip(texts, lengths, strict=True)]

    def _row(self, question: Asked) -> tuple[str, list[Image.Image]]:
        """The question as the model reads it, and the pictures in it."""
        shown = [to_picture(part, self.options.max_pixels) for part in question.parts if isinstance(part, Tensor)]
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in question.parts]
        chat = [{"role": "user", "content": content}]
        if question.system is not None:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": question.system}]})
        text = self.model.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return str(text), shown


def lengths_of(made: Tensor, ends: int | Sequence[int]) -> list[tuple[int, bool]]:
    """Tokens of each reply of [B L], its end among them and the padding after it not; and whether it came to an end."""
    is_end = torch.isin(made, torch.tensor(ends, device=made.device)).cpu()
    return [(int(row.int().argmax()) + 1, True) if bool(row.any()) else (len(row), False) for row in is_end]
