from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from velatura.api import Prompt, VelaturaError
from velatura.core.points import Group, MicroBatch, PointNoise, forward_points, pieces, trajectory_points
from velatura.core.stages.rl import require_whole
from velatura.plugins.objectives.dgpo import DGPO
from velatura.plugins.objectives.nft import NFT

Make = Callable[[int], list[Prompt]]
TIMES = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])


def groups_of(prompts: list[Prompt], *sizes: int) -> list[Group]:
    """Sample rows in the order of the prompts."""
    made, start = [], 0
    for prompt, size in zip(prompts, sizes, strict=True):
        made.append(Group(prompt=prompt, samples=tuple(range(start, start + size)), numbers=tuple(range(size))))
        start += size
    return made


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward(
    groups: list[Group], latents: Tensor, *, train: Any = (1, 2), shared: bool = True, **more: Any
) -> MicroBatch:
    noise = PointNoise(seed=7, step=more.get("step", 3), shared=shared)
    total = more.get("total", len(latents) * len(train))
    weight = more.get("weight", torch.ones(4))
    advantages = torch.arange(len(latents)).float()
    return forward_points(groups, latents, advantages, TIMES, torch.tensor(train), weight, noise, total)


def test_a_forward_point_lies_on_the_line_from_its_latents_to_its_noise(drawings: Make) -> None:
    x0 = values(5, 16, 48)
    batch = forward(groups_of(drawings(2), 2, 3), x0)
    points = batch.points
    assert points.x0 is not None
    assert points.target is not None
    assert points.t.tolist() == pytest.approx([0.8, 0.5] * 5)
    assert torch.equal(points.x0, x0.repeat_interleave(2, 0))
    t = points.t.reshape(-1, 1, 1)
    noise = points.target + points.x0
    torch.testing.assert_close(points.x, (1 - t) * points.x0 + t * noise)
    torch.testing.assert_close(points.x - t * points.target, points.x0)  # x_0 = x_t - t u
    assert abs(float(noise.mean())) < 0.05  # 5 x 2 x 768 standard normals, the half of them shared
    assert abs(float(noise.std()) - 1) < 0.05
    assert batch.rows.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert points.advantage.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert points.group is not None and points.group.tolist() == batch.rows.tolist()  # what `dgpo` compares


def test_weights_sum_to_1_over_all_micro_batches(drawings: Make) -> None:
    groups, x0 = groups_of(drawings(3), 4, 2, 3), values(9, 2)
    parts = [forward(part, x0, total=18) for part in pieces(groups, 2, 6)]
    assert len(parts) > 2
    assert sum(float(part.points.weight.sum()) for part in parts) == pytest.approx(1)


def test_the_weight_of_a_step_is_that_of_the_plan(drawings: Make) -> None:
    weight = torch.tensor([0.0, 1.0, 3.0, 0.0])
    points = forward(groups_of(drawings(1), 2), values(2, 2), weight=weight).points
    assert points.weight.tolist() == [0.25, 0.75, 0.25, 0.75]


def test_shared_noise_is_one_per_group_and_timestep(drawings: Make) -> None:
    points = forward(groups_of(drawings(2), 2, 2), torch.zeros(4, 8)).points
    assert points.target is not None
    noise = points.target.reshape(2, 2, 2, 8)  # prompt, sample, timestep
    assert torch.equal(noise[:, 0], noise[:, 1])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[:, :, 0], noise[:, :, 1])


def test_noise_that_is_not_shared_differs_between_samples(drawings: Make) -> None:
    points = forward(groups_of(drawings(1), 3), torch.zeros(3, 8), train=(1,), shared=False).points
    assert points.target is not None
    assert len({tuple(row) for row in points.target.tolist()}) == 3


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("limit", [2, 4, 6, 100])
def test_noise_does_not_depend_on_the_micro_batches(shared: bool, limit: int, drawings: Make) -> None:
    groups, x0 = groups_of(drawings(3), 4, 2, 3), values(9, 8)
    whole = forward(groups, x0, shared=shared).points
    parts = [forward(part, x0, shared=shared, total=18).points for part in pieces(groups, 2, limit)]
    assert torch.equal(torch.cat([p.x for p in parts]), whole.x)
    assert torch.equal(torch.cat([p.weight for p in parts]), whole.weight)


def test_noise_of_a_sample_stays_when_its_neighbours_are_dropped(drawings: Make) -> None:
    (prompt,) = drawings(1)
    x0 = values(3, 8)
    whole = forward(groups_of([prompt], 3), x0, shared=False, total=6).points
    rest = forward([Group(prompt=prompt, samples=(2,), numbers=(2,))], x0, shared=False, total=6).points
    assert torch.equal(rest.x, whole.x[4:])


def test_another_step_has_other_noise(drawings: Make) -> None:
    groups = groups_of(drawings(1), 1)
    assert not torch.equal(
        forward(groups, torch.zeros(1, 8), step=1).points.x, forward(groups, torch.zeros(1, 8)).points.x
    )


def test_pieces_fill_up_to_the_limit(drawings: Make) -> None:
    groups = groups_of(drawings(5), 2, 2, 2, 2, 2)
    parts = list(pieces(groups, 3, 12))
    assert [[group.prompt.id for group in part] for part in parts] == [
        ["draw/0", "draw/1"], ["draw/2", "draw/3"], ["draw/4"],
    ]  # fmt: skip


def test_a_group_is_split_only_when_it_alone_is_too_large(drawings: Make) -> None:
    groups = groups_of(drawings(3), 2, 5, 2)
    sizes = [[len(group.samples) for group in part] for part in pieces(groups, 2, 8)]
    assert sizes == [[2], [4], [1, 2]]
    unsplit = [[len(group.samples) for group in part] for part in pieces(groups, 2, 10)]
    assert unsplit == [[2], [5], [2]]


def test_a_part_of_a_group_is_refused_where_all_of_it_is_compared(drawings: Make) -> None:
    groups = groups_of(drawings(2), 2, 4)
    whole, part, *_ = pieces(groups, 2, 4)
    require_whole(DGPO(), whole, groups, 2, 4)
    require_whole(NFT(), part, groups, 2, 4)
    with pytest.raises(VelaturaError, match=r"'dgpo' .*'draw/1' have 8 points, more than micro_batch 4\. Set .* to 8"):
        require_whole(DGPO(), part, groups, 2, 4)


def test_no_sample_is_lost_or_doubled_by_splitting(drawings: Make) -> None:
    groups = groups_of(drawings(4), 7, 1, 3, 6)
    for limit in range(1, 20):
        parts = list(pieces(groups, 2, limit))
        assert sorted(b for part in parts for group in part for b in group.samples) == list(range(17))
        assert all(sum(len(group.samples) for group in part) * 2 <= max(2, limit) for part in parts)
        assert all(len(group.samples) == len(group.numbers) for part in parts for group in part)


def test_trajectory_points_are_the_visited_states(drawings: Make) -> None:
    states = values(5, 3, 8)
    weight = torch.tensor([1.0, 2.0, 4.0, 8.0])
    batch = trajectory_points(
        groups_of(drawings(2), 1, 2), states, torch.tensor([0.5, -1, 2]), TIMES, torch.tensor([0, 3]), weight, 6
    )
    points = batch.points
    assert points.x_next is not None
    assert points.t_next is not None
    for n, (b, k) in enumerate([(0, 0), (0, 3), (1, 0), (1, 3), (2, 0), (2, 3)]):
        assert torch.equal(points.x[n], states[k, b])
        assert torch.equal(points.x_next[n], states[k + 1, b])
        assert (points.t[n], points.t_next[n]) == (TIMES[k], TIMES[k + 1])
        assert points.weight[n] == weight[k] / 6
        assert points.advantage[n] == [0.5, -1, 2][b]
    assert batch.rows.tolist() == [0, 0, 1, 1, 1, 1]
    assert points.group is not None and points.group.tolist() == batch.rows.tolist()
    assert points.target is None
