from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from velatura.core.errors import CheckpointError
from velatura.core.policy import CURRENT, Policy
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter, TinyWorldAdapterOptions

CPU = torch.device("cpu")


@pytest.fixture
def policy() -> Policy:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw))
    net[0].bias.requires_grad_(False)
    return Policy(net)


def move(policy: Policy, by: float = 1.0) -> None:
    """What an optimiser step does."""
    with torch.no_grad():
        for weight in policy.parameters.values():
            weight.add_(by)
    policy.changed()


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_only_what_is_trained_is_kept(policy: Policy) -> None:
    policy.remember("old")
    assert set(policy.sets["old"]) == {"0.weight", "1.weight", "1.bias"}


def test_a_remembered_set_does_not_follow_the_current_weights(policy: Policy) -> None:
    before = snapshot(policy.weights())
    policy.remember("old")
    move(policy)
    assert equal(policy.sets["old"], before)


def test_a_set_is_worn_by_pointer_and_taken_off_again(policy: Policy) -> None:
    x = torch.ones(1, 3)
    policy.remember("old")
    expected = policy.net(x).detach()
    move(policy)
    own = {name: p.data_ptr() for name, p in policy.parameters.items()}
    now = policy.net(x).detach()
    with policy.wearing("old") as net:
        assert torch.equal(net(x), expected)
        assert policy.parameters["1.bias"].data_ptr() == policy.sets["old"]["1.bias"].data_ptr()
        assert not net(x).requires_grad
    assert {name: p.data_ptr() for name, p in policy.parameters.items()} == own
    assert torch.equal(policy.net(x).detach(), now)
    assert policy.net(x).requires_grad


def test_weights_are_restored_when_a_forward_fails(policy: Policy) -> None:
    policy.remember("old")
    move(policy)
    before = snapshot(policy.weights())
    with pytest.raises(ZeroDivisionError), policy.wearing("old"):
        raise ZeroDivisionError
    assert equal(policy.weights(), before)


def test_wearing_the_current_weights_switches_nothing_but_the_gradient_off(policy: Policy) -> None:
    with policy.wearing(CURRENT) as net:
        assert not net(torch.ones(1, 3)).requires_grad


def test_sets_are_the_same_until_the_current_weights_move(policy: Policy) -> None:
    policy.remember("old")
    policy.remember("reference")
    assert policy.same("old", CURRENT)
    assert policy.same("old", "reference")
    move(policy)
    assert not policy.same("old", CURRENT)
    assert policy.same("old", "reference")
    policy.follow("old", 0.0)
    assert policy.same("old", CURRENT)
    assert not policy.same("old", "reference")


def test_a_set_follows_by_an_exponential_moving_average(policy: Policy) -> None:
    policy.remember("old")
    start = snapshot(policy.weights())
    move(policy, by=1.0)
    policy.follow("old", 0.75)
    for name, value in policy.sets["old"].items():
        torch.testing.assert_close(value, start[name] + 0.25)
    assert not policy.same("old", CURRENT)
    policy.follow("old", 0.75)
    for name, value in policy.sets["old"].items():
        torch.testing.assert_close(value, start[name] + 1 - 0.75**2)


def test_decay_0_copies_exactly(policy: Policy) -> None:
    policy.remember("old")
    move(policy, by=0.1)
    policy.follow("old", 0.0)
    assert equal(policy.sets["old"], policy.weights())


def test_a_set_that_follows_shares_no_memory_with_the_current_weights(policy: Policy) -> None:
    policy.remember("old")
    move(policy)
    policy.follow("old", 0.0)
    move(policy)
    assert not equal(policy.sets["old"], policy.weights())


def test_loaded_weights_are_no_longer_the_same_as_what_was_remembered(policy: Policy) -> None:
    policy.remember("old")
    pointers = [p.data_ptr() for p in policy.parameters.values()]
    policy.load({name: torch.zeros_like(p) for name, p in policy.weights().items()}, what="a file")
    assert not policy.same("old", CURRENT)
    assert [p.data_ptr() for p in policy.parameters.values()] == pointers  # the engine's tensors, not others
    assert not any(p.any() for p in policy.weights().values())


def test_tensors_put_in_are_kept_on_the_device_asked_for(policy: Policy) -> None:
    tensors = {name: torch.ones_like(p, dtype=torch.float64) for name, p in policy.weights().items()}
    policy.put("teacher/t2i", tensors, what="a file", device=CPU)
    assert not policy.same("teacher/t2i", CURRENT)
    with policy.on_device("teacher/t2i", CPU), policy.wearing("teacher/t2i") as net:
        assert float(net[1].bias.sum()) == 2
    assert all(value.dtype == torch.float32 for value in policy.sets["teacher/t2i"].values())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_model_are_refused_and_nothing_changes(policy: Policy, change: str) -> None:
    tensors = snapshot(policy.weights())
    if change == "missing":
        del tensors["1.bias"]
    else:
        tensors["2.bias" if change == "extra" else "1.bias"] = torch.zeros(7)
    before = snapshot(policy.weights())
    for take in (policy.load, lambda t, what: policy.put("x", t, what=what)):
        with pytest.raises(CheckpointError, match=r"teacher\.safetensors is of another model.*[12]\.bias"):
            take(tensors, what="teacher.safetensors")  # type: ignore[operator]
    assert equal(policy.weights(), before)
    assert "x" not in policy.sets


def test_the_reference_of_lora_weights_is_exactly_the_base(
    adapter: TinyWorldAdapter, wake: Callable[[nn.Module], nn.Module], drawings: Callable[..., list]
) -> None:
    small = {"weights": None, "width": 48, "heads": 3, "layers": 2, "lora_rank": 4}
    lora = TinyWorldAdapter(TinyWorldAdapterOptions.model_validate(small))
    base, net = wake(adapter.load(CPU)), lora.load(CPU)
    weights = base.state_dict()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if ".lora_" not in name:
                tensor.copy_(weights[name.replace(".base_layer.", ".")])
    policy = Policy(net)
    policy.remember("reference")
    assert all(".lora_" in name for name in policy.parameters)
    assert sum(t.numel() for t in policy.sets["reference"].values()) < sum(t.numel() for t in weights.values()) / 5
    move(policy, by=0.1)
    prompts, rows = drawings(2), torch.arange(2)
    x, t = lora.noise(prompts, [1, 2]), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = adapter.velocity(base, x, t, adapter.encode(prompts), rows)
    with policy.wearing("reference") as worn:
        assert torch.equal(lora.velocity(worn, x, t, lora.encode(prompts), rows), expected)
    with policy.wearing(CURRENT) as worn:
        assert not torch.equal(lora.velocity(worn, x, t, lora.encode(prompts), rows), expected)
