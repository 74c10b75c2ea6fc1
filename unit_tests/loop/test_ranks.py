"""How work is shared by processes. That they agree is tested with real ones, in integration_tests/test_processes.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import pytest
import torch

from velatura.core.errors import RecipeError
from velatura.core.points import Group, idle, trajectory_points
from velatura.core.ranks import Ranks, threads_of_process
from velatura.core.types import Prompt

Make = Callable[[int], Sequence[Prompt]]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("shares", [1, 2, 4])
@pytest.mark.parametrize("count", [5, 7, 16, 33])
def test_everything_is_dealt_once_and_nobody_is_left_out(count: int, shares: int, size: int) -> None:
    dealt = Ranks(rank=0, size=size).deal(count, shares)
    assert sorted(i for own in dealt for i in own) == list(range(count))
    assert all(dealt)
    assert all(own == sorted(own) for own in dealt)


@pytest.mark.parametrize(("count", "shares", "size"), [(16, 4, 2), (64, 1, 8), (32, 4, 4), (12, 3, 2), (24, 2, 3)])
def test_every_optimiser_step_has_work_for_every_process(count: int, shares: int, size: int) -> None:
    """Dealing one by one would give all of 0, 4, 8, 12 to the first of two processes."""
    for own in Ranks(rank=0, size=size).deal(count, shares):
        for share in range(shares):
            assert sum(i % shares == share for i in own) == count // shares // size


def test_one_process_has_everything_in_order() -> None:
    assert Ranks().deal(5, 3) == [[0, 1, 2, 3, 4]]
    assert Ranks().own("abc") == ["a", "b", "c"]
    assert Ranks().gather("mine") == ["mine"]


def test_a_step_too_small_for_the_processes_is_refused() -> None:
    Ranks(size=4).require(4, "stages.x.prompts_per_step")
    with pytest.raises(RecipeError, match=r"stages\.x\.prompts_per_step: 3 a step cannot be shared by 4 processes"):
        Ranks(size=4).require(3, "stages.x.prompts_per_step")


def test_processes_share_the_threads_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_of_process(8) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert threads_of_process(8) == 2
    assert threads_of_process(2) == 1
    assert threads_of_process(None) is None


def test_an_idle_batch_is_one_point_that_weighs_nothing(drawings: Make) -> None:
    prompts = drawings(3)
    groups = [Group(prompt=p, samples=(i,), numbers=(0,)) for i, p in enumerate(prompts)]
    batch = trajectory_points(
        groups, torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)), torch.ones(3),
        torch.tensor([1.0, 0.6, 0.3, 0.0]), torch.tensor([1, 2]), torch.ones(3), 6,
    )  # fmt: skip
    rest = idle(batch)
    assert [p.id for p in rest.prompts] == [prompts[0].id]
    assert rest.points.weight.tolist() == [0]
    for field in fields(rest.points):
        value, before = getattr(rest.points, field.name), getattr(batch.points, field.name)
        assert (value is None) == (before is None)
        if value is not None and field.name != "weight":
            assert torch.equal(value, before[:1])
