from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velatura.api import Kernel, NoOptions, Prompt, Role, StepPlan, Transition
from velatura.core.rollout import Chunk, Sampler, by_layout, rollout
from velatura.core.seeds import generator
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter
from velatura.plugins.guidance.policies import Both, NoGuidance, RolloutOnly, ScaleOptions, TeacherOnly

Make = Callable[..., Any]
ROUNDING = {"rtol": 0, "atol": 2e-5}
"""fp32 sums in another order, over three steps of a network whose answers are about 1."""


def latents(chunks: list[Chunk]) -> Tensor:
    return torch.cat([chunk.latents for chunk in chunks])


def draw(net: nn.Module, sampler: Sampler, prompts: list[Prompt], group: int = 3, **options: Any) -> list[Chunk]:
    seeds = [[1000 * int(p.id.split("/")[1]) + j for j in range(group)] for p in prompts]
    return list(rollout(net, sampler, prompts, seeds, **options))


@pytest.mark.parametrize("kind", ["drawings", "edits"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_sample_does_not_depend_on_the_batch_size(
    kind: str, scale: float, net: nn.Module, sampler: Make, request: pytest.FixtureRequest
) -> None:
    prompts = request.getfixturevalue(kind)(3)
    guidance = RolloutOnly(ScaleOptions(scale=scale))
    two_groups = 6 if scale == 1 else 12  # of three samples, guided ones with two rows each
    together, small, single = (draw(net, sampler(guidance, batch=size), prompts) for size in (64, two_groups, 1))
    assert [len(chunks) for chunks in (together, small, single)] == [1, 2, 3]
    assert latents(together).std() > 0.1
    torch.testing.assert_close(latents(small), latents(together), **ROUNDING)
    torch.testing.assert_close(latents(single), latents(together), **ROUNDING)


def test_a_sample_does_not_depend_on_the_other_prompts(net: nn.Module, sampler: Make, drawings: Make) -> None:
    prompts = drawings(4)
    all_of_them = latents(draw(net, sampler(), prompts))
    backwards = latents(draw(net, sampler(), prompts[::-1]))
    alone = latents(draw(net, sampler(), [prompts[2]]))
    torch.testing.assert_close(alone, all_of_them[6:9], **ROUNDING)
    torch.testing.assert_close(backwards.reshape(4, 3, 16, 48).flip(0).flatten(0, 1), all_of_them, **ROUNDING)


def test_the_same_seed_gives_the_same_picture_bit_for_bit(net: nn.Module, sampler: Make, drawings: Make) -> None:
    first, second = (draw(net, sampler(), drawings(2))[0].samples for _ in range(2))
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].image, first[1].image)


def test_chunks_hold_whole_groups_in_the_order_of_the_prompts(net: nn.Module, sampler: Make, drawings: Make) -> None:
    chunks = draw(net, sampler(batch=8), drawings(5), group=3)
    assert [chunk.rows.tolist() for chunk in chunks] == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3], [4, 4, 4]]
    samples = [sample for chunk in chunks for sample in chunk.samples]
    assert [sample.group for sample in samples] == [b // 3 for b in range(15)]
    assert [sample.prompt.id for sample in samples] == [f"draw/{b // 3}" for b in range(15)]
    assert [sample.seed for sample in samples] == [1000 * (b // 3) + b % 3 for b in range(15)]


def test_a_group_larger_than_the_batch_stays_whole(net: nn.Module, sampler: Make, drawings: Make) -> None:
    chunks = draw(net, sampler(batch=2), drawings(2), group=5)
    assert [len(chunk.samples) for chunk in chunks] == [5, 5]


def test_prompts_of_different_layout_never_share_a_batch(
    net: nn.Module, sampler: Make, drawings: Make, edits: Make
) -> None:
    mixed = [*drawings(2), *edits(2), *drawings(1)]
    made = sampler()
    assert by_layout(made.adapter, mixed) == [[0, 1, 4], [2, 3]]
    assert by_layout(made.adapter, mixed, [3, 4, 2, 1]) == [[3, 2], [4, 1]]
    chunks = draw(net, made, mixed, group=2)
    assert [chunk.rows.tolist() for chunk in chunks] == [[0, 0, 1, 1, 4, 4], [2, 2, 3, 3]]


def test_the_solver_is_a_loop_of_euler_steps(
    net: nn.Module, sampler: Make, adapter: TinyWorldAdapter, drawings: Make
) -> None:
    prompts, scale = drawings(2), 3.0
    chunk = draw(net, sampler(RolloutOnly(ScaleOptions(scale=scale)), steps=5), prompts, group=2)[0]
    rows, times = torch.tensor([0, 0, 1, 1]), adapter.times(5)
    x = adapter.noise([prompts[0], prompts[0], prompts[1], prompts[1]], [0, 1, 1000, 1001])
    with torch.no_grad():
        cond, null = adapter.encode(prompts), adapter.null(prompts)
        for k in range(5):
            t = times[k].expand(4)
            with_text, without = (adapter.velocity(net, x, t, c, rows) for c in (cond, null))
            x = x + (times[k + 1] - times[k]) * (without + scale * (with_text - without))
    torch.testing.assert_close(chunk.latents, x, rtol=0, atol=1e-4)  # guidance triples the rounding of five steps
    torch.testing.assert_close(torch.stack([s.image for s in chunk.samples]), adapter.decode(x), rtol=0, atol=1e-4)


def test_a_kept_trajectory_goes_from_the_noise_to_the_latents(
    net: nn.Module, sampler: Make, adapter: TinyWorldAdapter, drawings: Make
) -> None:
    prompts = drawings(2)
    (chunk,) = draw(net, sampler(steps=4), prompts, group=3, keep_trajectory=True)
    assert chunk.trajectory is not None
    assert chunk.trajectory.shape == (5, 6, 16, 48)
    assert torch.equal(chunk.trajectory[0], adapter.noise([prompts[0]] * 6, [0, 1, 2, 1000, 1001, 1002]))
    assert torch.equal(chunk.trajectory[-1], chunk.latents)
    assert draw(net, sampler(steps=4), prompts)[0].trajectory is None


@pytest.mark.parametrize("guidance", [NoGuidance(), Both(ScaleOptions(scale=1)), TeacherOnly(ScaleOptions(scale=4))])
def test_at_scale_1_the_null_branch_is_never_evaluated(
    guidance: Any, net: nn.Module, sampler: Make, drawings: Make, forwards: Make
) -> None:
    rows = forwards(net)
    (chunk,) = draw(net, sampler(guidance), drawings(2), group=4)
    assert rows == [8, 8, 8]
    assert chunk.network_rows == 24


def test_both_branches_share_a_forward_when_they_fit(
    net: nn.Module, sampler: Make, drawings: Make, forwards: Make
) -> None:
    rows, guidance = forwards(net), RolloutOnly(ScaleOptions(scale=2))
    (joint,) = draw(net, sampler(guidance, batch=16), drawings(2), group=4)
    assert rows == [16, 16, 16]
    rows.clear()
    (apart,) = draw(net, sampler(guidance, batch=15), drawings(1), group=15)
    assert rows == [15] * 6
    assert (joint.network_rows, apart.network_rows) == (48, 90)


def test_guidance_is_decided_step_by_step(net: nn.Module, sampler: Make, drawings: Make, forwards: Make) -> None:
    class Early(RolloutOnly):
        def scale(self, role: Role, t: Tensor) -> Tensor:
            return torch.where(t > 0.9, 3.0, 1.0)

    rows = forwards(net)
    draw(net, sampler(Early()), drawings(1), group=4)
    assert rows == [8, 4, 4]


class Jitter(Kernel[NoOptions]):
    """An Euler step and half a unit of noise."""

    name = "jitter"
    stochastic = True

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        return Transition(mean=x + (t_next - t) * v, std=torch.tensor(0.5))


def test_noise_of_a_step_comes_from_the_samples_own_stream(net: nn.Module, sampler: Make, drawings: Make) -> None:
    plan = StepPlan(train=torch.arange(3), stochastic=torch.tensor([False, True, False]), weight=torch.ones(3))
    noisy = sampler(kernel=Jitter())
    (chunk,) = draw(net, noisy, drawings(2), plan=plan, keep_trajectory=True)
    (calm,) = draw(net, noisy, drawings(2), keep_trajectory=True)
    alone = latents(draw(net, sampler(kernel=Jitter(), batch=1), drawings(2), plan=plan))
    torch.testing.assert_close(alone, chunk.latents, **ROUNDING)
    assert chunk.trajectory is not None
    assert calm.trajectory is not None
    assert torch.equal(chunk.trajectory[1], calm.trajectory[1])
    expected = 0.5 * torch.randn(16, 48, generator=generator(1001, "kernel", 1))
    torch.testing.assert_close(chunk.trajectory[2, 4] - calm.trajectory[2, 4], expected, rtol=0, atol=1e-5)
