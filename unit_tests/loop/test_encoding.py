from __future__ import annotations

from collections.abc import Sequence

import torch

from velatura.api import Prompt
from velatura.core.encoding import Encoder
from velatura.core.types import Conditioning
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter, TinyWorldAdapterOptions
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions

CPU = torch.device("cpu")


class Counting(TinyWorldAdapter):
    """The real adapter, which remembers what it was asked to encode."""

    def __init__(self) -> None:
        super().__init__(TinyWorldAdapterOptions(weights=None, width=48, layers=2))
        self.encoded: list[str] = []
        self.nulls = 0

    def encode(self, prompts: Sequence[Prompt]):  # type: ignore[no-untyped-def]
        self.encoded += [prompt.id for prompt in prompts]
        return super().encode(prompts)

    def null(self, prompts: Sequence[Prompt]):  # type: ignore[no-untyped-def]
        self.nulls += len(prompts)
        return super().null(prompts)


def prompts(task: str, count: int) -> list[Prompt]:
    every = TinyWorld(TinyWorldOptions(task=task, count=count)).prompts("train")
    return [every[i] for i in range(count)]


def texts(cond: Conditioning) -> torch.Tensor:
    return cond.text[cond.index]  # type: ignore[attr-defined,no-any-return]


def test_a_prompt_is_encoded_once_however_it_is_cut_into_batches() -> None:
    adapter, own = Counting(), prompts("t2i", 8)
    encoder = Encoder(adapter, CPU)
    encoder.cond(own)
    for part in (own[:4], own[4:], own[2:6], own[::-1]):
        assert torch.equal(texts(encoder.cond(part)), texts(adapter.__class__.encode(Counting(), part)))
    assert len(adapter.encoded) == 8


def test_the_null_condition_of_text_to_image_is_made_once_for_the_run() -> None:
    adapter = Counting()
    encoder = Encoder(adapter, CPU)
    for own in (prompts("t2i", 3), prompts("t2i", 8)):
        null = encoder.null(own)
        assert len(null) == len(own)
    assert adapter.nulls == 1


def test_the_null_condition_of_an_edit_keeps_its_own_source() -> None:
    adapter, own = Counting(), prompts("edit", 4)
    encoder = Encoder(adapter, CPU)
    null = encoder.null(own)
    assert torch.equal(null.sources[null.index], adapter.latents(torch.stack([p.sources[0] for p in own])))  # type: ignore[attr-defined]
    encoder.null(own[1:3])
    assert adapter.nulls == 4


def test_old_batches_leave_so_that_memory_stays_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("velatura.core.encoding.KEPT", 2)
    adapter, own = Counting(), prompts("t2i", 6)
    encoder = Encoder(adapter, CPU)
    for i in range(0, 6, 2):
        encoder.cond(own[i : i + 2])
    encoder.cond(own[:2])
    assert len(adapter.encoded) == 8


def test_a_new_step_starts_from_nothing_but_the_null_condition() -> None:
    adapter, own = Counting(), prompts("t2i", 4)
    encoder = Encoder(adapter, CPU)
    encoder.cond(own)
    encoder.null(own)
    encoder.forget()
    encoder.cond(own)
    encoder.null(own)
    assert len(adapter.encoded) == 8
    assert adapter.nulls == 1
