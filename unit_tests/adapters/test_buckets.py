"""Many shapes of sources in few buckets, and what a rollout makes of prompts of several layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velatura.api import Prompt, VelaturaError
from velatura.core.points import Group, forward_points, pieces
from velatura.core.points import PointNoise as Noise
from velatura.core.rollout import Chunk, Sampler, by_layout, rollout
from velatura.plugins.adapters.sizes import RATIOS, buckets_of, nearest, stretched
from velatura.plugins.guidance.policies import RolloutOnly, ScaleOptions
from velatura.schedulers.kernels import Ode

Make = Callable[..., Any]
CPU = torch.device("cpu")
BUCKETS = [[64, 64], [64, 96], [96, 64]]
SHAPES = [(80, 64), (60, 64), (300, 200), (50, 75), (90, 60), (64, 61), (51, 73)]
"""Of source images: five different ones near 3:2, 1:1 and 2:3."""


def edits(shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Prompt]:
    draw = torch.Generator().manual_seed(4)
    return [
        Prompt(id=f"edit/{i}", text=f"make it {i}", task="edit", sources=(torch.rand(3, *shape, generator=draw),))
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("area", [512 * 512, 1024 * 1024])
def test_automatic_buckets_have_the_configured_area_and_stretch_little(area: int) -> None:
    sizes = buckets_of("auto", area, 32, "x")
    assert len(set(sizes)) == 2 * len(RATIOS) - 1
    assert (math.isqrt(area), math.isqrt(area)) in sizes
    for height, width in sizes:
        assert height % 32 == width % 32 == 0
        assert abs(height * width / area - 1) < 0.06
        assert (width, height) in sizes
    for ratio in torch.linspace(4 / 9, 9 / 4, 200).tolist():
        height, width = nearest(sizes, (1000, round(1000 * ratio)))
        assert 1 / 1.17 < width / height / ratio < 1.17


def test_the_nearest_bucket_is_that_of_the_shape_whatever_the_size() -> None:
    sizes = ((64, 64), (64, 96), (128, 192), (96, 64))
    assert nearest(sizes, (10, 15)) == (64, 96)
    assert nearest(sizes, (1000, 1500)) == (128, 192)
    assert nearest(sizes, (128, 192)) == (128, 192)
    assert nearest(sizes, (70, 64)) == (64, 64)


def test_a_source_is_stretched_and_nothing_of_it_cut_off() -> None:
    ramp = torch.linspace(0, 1, 80)[:, None].expand(3, 80, 64)
    small = stretched(ramp, (32, 32))
    assert small.shape == (3, 32, 32)
    torch.testing.assert_close(small[0, :, 5], torch.linspace(0, 1, 32), rtol=0, atol=0.02)
    assert stretched(ramp, (80, 64)) is ramp


def test_without_buckets_every_shape_is_a_layout_and_with_them_there_are_few(opened: Make) -> None:
    free, bucketed = opened("qwen_image_21"), opened("qwen_image_21", buckets=BUCKETS)
    assert len({free.layout(prompt) for prompt in edits()}) == len(SHAPES)
    expected = [(96, 64), (64, 64), (96, 64), (64, 96), (96, 64), (64, 64), (64, 96)]
    assert [bucketed.layout(prompt) for prompt in edits()] == [(size, size) for size in expected]
    both = Prompt(id="b", text="", task="edit", sources=(torch.rand(3, 80, 64), torch.rand(3, 50, 50)))
    assert bucketed.layout(both) == ((64, 64), (96, 64), (64, 64))


def test_only_what_has_a_shape_of_its_own_goes_into_a_bucket(opened: Make) -> None:
    adapter = opened("qwen_image_21", buckets=BUCKETS, height=128, width=64)
    assert adapter.size(Prompt(id="p", text="x", task="t2i")) == (128, 64)
    assert adapter.size(Prompt(id="p", text="x", task="t2i", size=(64, 96))) == (64, 96)
    assert adapter.size(Prompt(id="p", text="x", task="t2i", size=(101, 67))) == (96, 64)


def test_a_bucket_that_cannot_be_drawn_is_refused(opened: Make) -> None:
    adapter = opened("qwen_image_21", buckets=[[64, 64], [64, 90]])
    with pytest.raises(VelaturaError, match=r"`buckets` has a picture of 90 x 64 .*multiples of 32\. .* is 96 x 64\."):
        adapter.layout(edits()[0])


def test_a_row_is_that_of_the_source_in_its_bucket(opened: Make) -> None:
    bucketed, free = opened("qwen_image_21", buckets=BUCKETS), opened("qwen_image_21")
    (prompt,) = edits([(90, 62)])
    (done,) = [stretched(prompt.sources[0], (96, 64))]
    given = Prompt(id="x", text=prompt.text, task="edit", sources=(done,), size=(96, 64))
    ours, theirs = bucketed.encode([prompt]), free.encode([given])
    assert ours.layout == theirs.layout
    assert torch.equal(ours.text, theirs.text)
    assert torch.equal(ours.sources, theirs.sources)


def test_a_family_that_looks_at_more_than_it_draws_gets_sources_of_that_size(opened: Make) -> None:
    adapter = opened("qwen_image_21", buckets=BUCKETS, source_area=4 * 64 * 64)
    assert adapter.layout(edits([(90, 62)])[0]) == ((96, 64), (157, 105))
    assert adapter.layout(edits([(200, 200)])[0]) == ((64, 64), (128, 128))


@pytest.fixture
def drawn(opened: Make) -> Callable[[int], tuple[list[Chunk], list[tuple[int, int]]]]:
    """Rollouts of text and edits of several shapes, by the size of the batch, with the forwards they took."""
    adapter = opened("qwen_image_21", buckets=BUCKETS, lora_rank=None)
    net = adapter.load(CPU)

    def draw(batch: int) -> tuple[list[Chunk], list[tuple[int, int]]]:
        forwards = watched(net)
        guidance = RolloutOnly(ScaleOptions(scale=2.0))
        sampler = Sampler(adapter=adapter, guidance=guidance, kernel=Ode(), steps=3, batch=batch)
        prompts = mixed()
        seeds = [[100 * i + j for j in range(3)] for i in range(len(prompts))]
        return list(rollout(net, sampler, prompts, seeds)), forwards

    return draw


def mixed() -> list[Prompt]:
    text = [Prompt(id=f"draw/{i}", text="a red fox " + "x" * i, task="t2i", size=(70, 100)) for i in range(2)]
    changes = edits()
    return [changes[0], text[0], *changes[1:5], text[1], *changes[5:]]


def watched(net: nn.Module) -> list[tuple[int, int]]:
    """(rows, tokens of the picture) of each forward from now on."""
    found: list[tuple[int, int]] = []

    def note(_: nn.Module, __: object, options: dict[str, Any]) -> None:
        if options["kv_cache_mode"] == "cached":
            (grids,) = options["img_shapes"]
            found.append((len(options["hidden_states"]), math.prod(grids[-1])))

    net.register_forward_pre_hook(note, with_kwargs=True)
    return found


def in_prompt_order(chunks: Sequence[Chunk]) -> list[Tensor]:
    latents = [(row, x) for chunk in chunks for row, x in zip(chunk.rows.tolist(), chunk.latents, strict=True)]
    return [x for _, x in sorted(latents, key=lambda pair: pair[0])]


def test_a_rollout_draws_whole_groups_layout_by_layout_in_the_order_of_the_prompts(drawn: Make, opened: Make) -> None:
    chunks, forwards = drawn(1000)
    layouts = by_layout(opened("qwen_image_21", buckets=BUCKETS), mixed())
    assert layouts == [[0, 3, 5], [1, 6], [2, 7], [4, 8]]
    assert [chunk.rows.tolist() for chunk in chunks] == [[row for row in alike for _ in range(3)] for alike in layouts]
    assert [{tuple(sample.image.shape[1:]) for sample in chunk.samples} for chunk in chunks] == [
        {(96, 64)}, {(64, 96)}, {(64, 64)}, {(64, 96)},
    ]  # fmt: skip
    assert [tokens for _, tokens in forwards] == [t for t in (24, 24, 16, 24) for _ in range(len(forwards) // 4)]
    assert sum(rows for rows, _ in forwards) == 9 * 3 * 3 * 2  # prompts, samples, steps, branches


def test_a_rollout_of_several_layouts_does_not_depend_on_the_size_of_the_batch(drawn: Make) -> None:
    together, apart, single = (in_prompt_order(drawn(batch)[0]) for batch in (1000, 12, 1))
    assert len(together) == 27
    for other in (apart, single):
        for a, b in zip(together, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)  # sums in another order
    assert float(torch.stack([x.std() for x in together]).min()) > 0.1


def test_micro_batches_hold_one_layout_each(opened: Make) -> None:
    adapter = opened("qwen_image_21", buckets=BUCKETS)
    prompts = mixed()
    seen = []
    for alike in by_layout(adapter, prompts):
        groups = [
            Group(prompt=prompts[row], samples=(3 * i, 3 * i + 1, 3 * i + 2), numbers=(0, 1, 2))
            for i, row in enumerate(alike)
        ]
        x = adapter.noise([prompts[row] for row in alike for _ in range(3)], list(range(3 * len(alike))))
        times, train = adapter.times(4, prompts[alike[0]]), torch.tensor([0, 1])
        for part in pieces(groups, 2, 12):
            batch = forward_points(
                part, x, torch.zeros(len(x)), times, train, torch.ones(4), Noise(seed=0, step=0, shared=True), 54
            )
            assert len({adapter.layout(prompt) for prompt in batch.prompts}) == 1
            adapter.encode(batch.prompts)  # refuses several layouts
            seen.append(len(batch.points.x))
    assert seen == [12, 6, 12, 12, 12]
