from __future__ import annotations

import torch

from velatura.core import seeds


def test_a_stream_depends_on_its_name_alone() -> None:
    assert seeds.derive(7, "rollout", 3, "p", 0) == seeds.derive(7, "rollout", 3, "p", 0)
    assert seeds.derive(7, "rollout") == 6437034861727134839  # pinned: a resumed run draws what the first would have


def test_order_type_and_grouping_make_another_stream() -> None:
    texts = [(), ("",), ("a",), ("a1",), ("a", "b"), ("ab",), ("ab", ""), ("a:b",)]
    paths = [*texts, ("a", 1), (1, "a"), ("a", "1"), (-1,), (1, 1), (11,)]
    assert len({seeds.derive(0, *path) for path in paths}) == len(paths)
    assert seeds.derive(0, 1) != seeds.derive(1, 0)
    assert seeds.derive(0, "a") != seeds.derive(1, "a")


def test_a_hundred_thousand_streams_have_as_many_seeds() -> None:
    found = {seeds.derive(1, "rollout", step, prompt) for step in range(100) for prompt in range(1000)}
    assert len(found) == 100_000
    assert all(0 <= seed < 2**63 for seed in found)


def test_seeds_are_spread_evenly() -> None:
    drawn = torch.tensor([seeds.derive(0, i) / 2**63 for i in range(10_000)])
    assert abs(drawn.mean() - 0.5) < 0.015  # 5 standard errors of 1 / sqrt(12 n)


def test_a_generator_starts_its_stream_anew() -> None:
    a, b = seeds.generator(0, "x"), seeds.generator(0, "x")
    torch.rand(3, generator=a)
    assert torch.equal(torch.rand(3, generator=seeds.generator(0, "x")), torch.rand(3, generator=b))
    assert not torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=seeds.generator(0, "y")))
