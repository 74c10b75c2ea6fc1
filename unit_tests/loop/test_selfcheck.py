from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velatura.api import Loss, NoOptions, Points, PolicyObjective, Prompt, Requirements, Role
from velatura.core.errors import SelfCheckError
from velatura.core.learner import Learner
from velatura.core.points import Group, MicroBatch, PointNoise, forward_points
from velatura.core.selfcheck import self_check
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter
from velatura.plugins.objectives.awm import AWM, AWMOptions
from velatura.plugins.objectives.nft import NFT, NFTOptions
from velatura.plugins.objectives.sft import SFT

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
