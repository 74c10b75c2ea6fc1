from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velatura.api import Loss, NoOptions, Points, PolicyObjective, Prompt, Requirements, Role, StepPlan
from velatura.core.alike import checksum, plan_facts, require_same, require_same_weights
from velatura.core.errors import SelfCheckError
from velatura.core.learner import Learner
from velatura.core.points import Group, MicroBatch, PointNoise, forward_points, trajectory_points
from velatura.core.ranks import Ranks
from velatura.core.rollout import Sampler, rollout
from velatura.core.selfcheck import self_check
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter
from velatura.plugins.guidance.policies import NoGuidance
from velatura.plugins.objectives.awm import AWM, AWMOptions
from velatura.plugins.objectives.flow_grpo import FlowGRPO
from velatura.plugins.objectives.nft import NFT, NFTOptions
from velatura.plugins.objectives.sft import SFT
from velatura.schedulers.stochastic import FlowSde

Make = Callable[..., Any]


@pytest.fixture
def batch(adapter: TinyWorldAdapter, drawings: Callable[[int], list[Prompt]]) -> MicroBatch:
    draw = torch.Generator().manual_seed(5)
    latents, advantages = torch.randn(4, 16, 48, generator=draw), torch.randn(4, generator=draw)
    groups = [Group(prompt=p, samples=(2 * i, 2 * i + 1), numbers=(0, 1)) for i, p in enumerate(drawings(2))]
    noise = PointNoise(seed=1, step=0, shared=True)
    train = torch.tensor([1, 2])
    return forward_points(groups, latents, advantages, adapter.times(6), train, torch.ones(6), noise, 8)


@pytest.mark.parametrize(
    "objective",
    [NFT(), NFT(NFTOptions(normalise="none", kl=0)), AWM(), AWM(AWMOptions(clip_range=0.2)), SFT()],
)
def test_an_honest_set_up_passes_and_leaves_no_trace(objective: Any, learner: Make, batch: MicroBatch) -> None:
    learn: Learner = learner(objective)
    before = {name: value.clone() for name, value in learn.policy.weights().items()}
    self_check(learn, batch)
    assert all(torch.equal(learn.policy.weights()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in learn.policy.parameters.values())


@pytest.mark.parametrize("name", ["old", "reference"])
def test_a_policy_that_is_not_the_current_one_is_refused(name: str, learner: Make, batch: MicroBatch) -> None:
    learn: Learner = learner(NFT())
    with torch.no_grad():
        learn.policy.sets[name]["proj_out.weight"][0, 0] += 1e-3
    with pytest.raises(SelfCheckError, match=f"the {name} policy differs from the current one by up to .*e-0[34]"):
        self_check(learn, batch)


def test_weights_changed_behind_the_runs_back_are_found(learner: Make, batch: MicroBatch) -> None:
    learn: Learner = learner(NFT())
    with torch.no_grad():
        learn.policy.net.proj_out.weight.mul_(1.01)  # type: ignore[union-attr]
    assert learn.policy.same("old", "current")  # as far as anybody knows
    with pytest.raises(SelfCheckError, match="differs"):
        self_check(learn, batch)


def test_dropout_that_is_on_is_found(net: nn.Module, learner: Make, batch: MicroBatch) -> None:
    inner = net.transformer_blocks[1].attn.to_out[0]
    net.transformer_blocks[1].attn.to_out[0] = nn.Sequential(inner, nn.Dropout(0.1))
    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # nn.Dropout draws from the global generator
        with pytest.raises(SelfCheckError, match=r"not deterministic \(dropout on\?\)"):
            self_check(learner(NFT(), module=net), batch)


class Pushes(PolicyObjective[NoOptions]):
    """Moves the policy whatever the advantage is."""

    name = "pushes"
    requires = Requirements(roles=frozenset({Role.CURRENT, Role.OLD}), rollout_role=Role.OLD)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        return Loss(value=velocity[Role.CURRENT].mean())


def test_an_objective_that_moves_the_policy_at_zero_advantage_is_refused(learner: Make, batch: MicroBatch) -> None:
    learn: Learner = learner(Pushes())
    with pytest.raises(SelfCheckError, match=r"objective 'pushes' gives gradient norm .* at zero advantage"):
        self_check(learn, batch)
    assert all(p.grad is None for p in learn.policy.parameters.values())


def test_an_objective_without_rewards_may_move_the_policy(learner: Make, batch: MicroBatch) -> None:
    class Pulls(Pushes):
        name = "pulls"
        requires = Requirements(roles=frozenset({Role.CURRENT}), advantage=False)

    self_check(learner(Pulls()), batch)


def test_a_network_without_trained_parameters_is_refused(learner: Make, batch: MicroBatch) -> None:
    learn: Learner = learner(NFT())
    learn.policy.parameters.clear()
    with pytest.raises(SelfCheckError, match="nothing to learn"):
        self_check(learn, batch)


def test_weights_that_are_not_finite_are_refused(learner: Make, batch: MicroBatch) -> None:
    learn: Learner = learner(NFT())
    with torch.no_grad():
        learn.policy.net.proj_out.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(SelfCheckError, match="not finite before any update"):
        self_check(learn, batch)


def test_lora_that_is_bound_to_nothing_is_refused(learner: Make, batch: MicroBatch) -> None:
    learn: Learner = learner(NFT())
    learn.adapter.options = learn.adapter.options.model_copy(update={"lora_rank": 4})
    try:
        with pytest.raises(SelfCheckError, match=r"LoRA of rank 4 .* bound to 0 modules: none of the \d+ trained"):
            self_check(learn, batch)
    finally:
        learn.adapter.options = learn.adapter.options.model_copy(update={"lora_rank": None})


def test_points_at_other_times_than_the_rollouts_are_refused(
    learner: Make, batch: MicroBatch, adapter: TinyWorldAdapter
) -> None:
    self_check(learner(NFT()), batch, [adapter.times(6)])
    with pytest.raises(SelfCheckError, match=r"at which the rollout took no step.*sigmas of training are not those"):
        self_check(learner(NFT()), batch, [adapter.times(5)])


def test_noise_mixed_in_at_other_sigmas_than_the_network_is_told_is_found(learner: Make, batch: MicroBatch) -> None:
    shifted = replace(batch, points=replace(batch.points, x=batch.points.x + 0.01 * batch.points.target))
    with pytest.raises(SelfCheckError, match=r"noised states are off by up to .* from x_0 \+ t u"):
        self_check(learner(NFT()), shifted)


@pytest.fixture
def drawn(adapter: TinyWorldAdapter, net: nn.Module, drawings: Make) -> tuple[MicroBatch, Tensor]:
    """Points of a stochastic rollout, and its times."""
    kernel, prompts, times = FlowSde(), drawings(2), adapter.times(4)
    sampler = Sampler(adapter=adapter, guidance=NoGuidance(), kernel=kernel, steps=4, batch=64)
    plan = StepPlan.training(torch.tensor([0, 1]), steps=4, noise="all")
    (chunk,) = rollout(net, sampler, prompts, [[1, 2], [3, 4]], plan, keep_trajectory=True)
    groups = [Group(prompt=p, samples=(2 * i, 2 * i + 1), numbers=(0, 1)) for i, p in enumerate(prompts)]
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    made = trajectory_points(
        groups, chunk.trajectory, advantages, times, plan.train, plan.weight, 8, kernel, chunk.log_prob
    )
    return made, times


def test_steps_of_a_rollout_are_as_likely_as_they_were_when_they_were_drawn(
    learner: Make, drawn: tuple[MicroBatch, Tensor]
) -> None:
    batch, times = drawn
    self_check(learner(FlowGRPO()), batch, [times])
    points = replace(batch.points, log_prob=batch.points.log_prob + 0.1)
    with pytest.raises(SelfCheckError, match=r"log-likelihood of a step .* by up to 1\.00e-01.*Kernel 'flow-sde'"):
        self_check(learner(FlowGRPO()), replace(batch, points=points), [times])


def test_steps_that_end_elsewhere_than_the_rollouts_are_refused(
    learner: Make, drawn: tuple[MicroBatch, Tensor]
) -> None:
    batch, times = drawn
    points = replace(batch.points, t_next=batch.points.t_next - 0.01)
    with pytest.raises(SelfCheckError, match="which is no step of the rollout"):
        self_check(learner(FlowGRPO()), replace(batch, points=points), [times])


class Several(Ranks):
    """Ranks of which the second gives what it is told to; the collective itself is tested with real processes."""

    def gather(self, mine: Any) -> list[Any]:
        return [mine, self.other(mine)]

    other: Any = staticmethod(lambda mine: mine)


def test_processes_with_other_facts_or_weights_are_told_by_the_first_difference(net: nn.Module) -> None:
    ranks = Several(rank=0, size=2)
    require_same(ranks, {"recipe": "a", "version of torch": "2"}, "before the first update")
    require_same_weights(ranks, net, "before the first update")
    Several.other = staticmethod(lambda mine: {**mine, "version of torch": "3"} if isinstance(mine, dict) else mine)
    with pytest.raises(SelfCheckError, match="process 1 has another version of torch than process 0: 3 and 2"):
        require_same(ranks, {"recipe": "a", "version of torch": "2"}, "before the first update")
    Several.other = staticmethod(lambda mine: {**mine, "proj_out.bias": 1} if isinstance(mine, dict) else mine + "x")
    with pytest.raises(SelfCheckError, match=r"process 1 holds other weights .* first in 'proj_out\.bias'"):
        require_same_weights(ranks, net, "before the first update")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64])
def test_a_checksum_sees_one_changed_bit_an_exchange_and_a_length(dtype: torch.dtype) -> None:
    one = (torch.arange(60, dtype=torch.float32) % 7).to(dtype).reshape(6, 10)
    other, swapped = one.clone(), one.clone()
    other[3, 3] += 1
    swapped[0, 0], swapped[0, 1] = one[0, 1], one[0, 0]
    found = {checksum(one), checksum(other), checksum(swapped), checksum(one.flatten()[:-1])}
    assert len(found) == 4
    assert checksum(one) == checksum(one.clone())
    assert checksum(one.T) == checksum(one.T.contiguous())


def test_plans_differ_by_name(drawings: Make) -> None:
    prompts, times = drawings(3), torch.tensor([1.0, 0.5, 0.0])
    plan = StepPlan.training(torch.tensor([0]), steps=2)
    facts = plan_facts(prompts, times, plan)
    for other, name in [
        (plan_facts(prompts[:2], times, plan), "list of prompts"),
        (plan_facts(prompts, times * 0.9, plan), "time grid"),
        (plan_facts(prompts, times, StepPlan.training(torch.tensor([1]), steps=2)), "plan of trained steps"),
        (plan_facts(prompts, times, replace(plan, stochastic=torch.tensor([True, False]))), "plan of noisy steps"),
    ]:
        assert [key for key in facts if facts[key] != other[key]] == [name]
