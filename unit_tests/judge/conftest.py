from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger

from velatura.api import Context, Prompt, Sample
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.reward import VlmJudge

sys.path.insert(0, str(Path(__file__).parent))

import chat_server as serving


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(device=torch.device("cpu"), cache=tmp_path / "cache", seed=0, base=tmp_path)


@pytest.fixture
def pictures() -> Callable[..., list[Sample]]:
    """Grey pictures of these brightnesses, for one prompt."""

    def make(values: Sequence[float], *, sources: int = 0, text: str = "a grey wall") -> list[Sample]:
        prompt = Prompt(
            id="p", text=text, task="edit" if sources else "t2i",
            sources=tuple(torch.full((3, 8, 8), 0.1 * (i + 1)) for i in range(sources)),
        )  # fmt: skip
        return [Sample(prompt=prompt, image=torch.full((3, 12, 16), v), seed=i) for i, v in enumerate(values)]

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Chat servers that are gone after the test."""
    with ExitStack() as stack:
        yield lambda *given, **named: stack.enter_context(serving.ChatServer(*given, **named))


@pytest.fixture
def judge(context: Context) -> Callable[..., VlmJudge]:
    """A judge behind a server, set up; quick to repeat."""

    def make(server: Any, rubric: str = "alignment", *, ready: bool = True, **options: Any) -> VlmJudge:
        given = {"rubric": rubric, "model": serving.MODEL, "server": server.address, "backoff": 0.001} | options
        made = VlmJudge(VlmJudgeOptions.model_validate(given))
        if ready:
            made.setup(context)
            server.questions.clear()
        return made

    return make


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What is logged as a warning or worse."""
    said: list[str] = []
    number = logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
    yield said
    logger.remove(number)
