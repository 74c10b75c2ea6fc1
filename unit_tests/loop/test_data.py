from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice

import pytest

from velatura.api import Prompt
from velatura.core.data import EpochSampler, PromptStream
from velatura.core.errors import RecipeError


@pytest.fixture
def prompts(drawings: Callable[[int], list[Prompt]]) -> list[Prompt]:
    return drawings(10)


def ids(stream: PromptStream, steps: int) -> list[list[str]]:
    return [[prompt.id for prompt in next(stream)] for _ in range(steps)]


def stream(prompts: list[Prompt], *, seed: int = 3, start: int = 0, batch: int = 3) -> PromptStream:
    return PromptStream(prompts, batch, seed=seed, at="stages.teacher", start=start)


def test_the_order_is_a_function_of_the_seed(prompts: list[Prompt]) -> None:
    assert ids(stream(prompts), 8) == ids(stream(prompts), 8)
    assert ids(stream(prompts), 8) != ids(stream(prompts, seed=4), 8)


def test_every_epoch_has_another_order(prompts: list[Prompt]) -> None:
    seen = ids(stream(prompts), 9)
    assert sorted(seen[0:3]) != sorted(seen[3:6])
    assert sorted(seen[3:6]) != sorted(seen[6:9])


@pytest.mark.parametrize("step", range(8))
def test_a_resumed_stream_gives_what_the_uncut_one_gives(prompts: list[Prompt], step: int) -> None:
    assert ids(stream(prompts, start=step), 8 - step) == ids(stream(prompts), 8)[step:]


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 10])
def test_no_prompt_comes_twice_in_a_step_or_in_an_epoch(prompts: list[Prompt], batch: int) -> None:
    per_epoch = len(prompts) // batch
    seen = ids(stream(prompts, batch=batch), 3 * per_epoch)
    for epoch in range(3):
        one = [key for step in seen[epoch * per_epoch : (epoch + 1) * per_epoch] for key in step]
        assert len(set(one)) == len(one) == per_epoch * batch


def test_over_many_epochs_every_prompt_comes_about_equally_often(prompts: list[Prompt]) -> None:
    seen = [key for step in ids(stream(prompts), 300) for key in step]
    counts = [seen.count(prompt.id) for prompt in prompts]
    assert sum(counts) == 900
    assert min(counts) > 75  # 90 expected of 100 epochs, each leaves one of ten out: std 3


def test_a_step_cannot_have_more_prompts_than_there_are(prompts: list[Prompt]) -> None:
    with pytest.raises(RecipeError, match=r"stages\.teacher: 11 prompts a step.*only 10.*prompts_per_step"):
        stream(prompts, batch=11)


def test_the_state_of_the_sampler_is_plain_data_and_goes_on_in_the_middle_of_an_epoch() -> None:
    sampler = EpochSampler(10, 3, seed=1)
    whole = list(islice(EpochSampler(10, 3, seed=1), 30))
    first = list(islice(sampler, 13))
    other = EpochSampler(10, 3, seed=1)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert first + list(islice(other, 17)) == whole
