"""Current, old, reference and teachers of a real transformer: LoRA tensors on one base, switched by pointer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velatura.api import ModelAdapter, Prompt
from velatura.core.engine.local import placed
from velatura.core.policy import CURRENT, Policy

Make = Callable[..., Any]
CPU = torch.device("cpu")
PROMPT = Prompt(id="p", text="a red fox", task="t2i")
FAMILIES = ["qwen_image_21", "sd3"]


def policy_of(adapter: ModelAdapter[Any], precision: str) -> Policy:
    """As the stages make it: loaded, put into its precision, with an old policy, a reference and a teacher."""
    policy = Policy(placed(adapter.load(CPU), CPU, precision))
    policy.remember("old")
    policy.remember("reference", follows=False)
    teacher = {name: torch.full(p.shape, 0.02) for name, p in policy.parameters.items()}
    policy.put("teacher/t2i", teacher, what="a teacher", device=CPU)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(0.05)
    policy.changed()
    return policy


def velocity(adapter: ModelAdapter[Any], net: nn.Module) -> Tensor:
    x, t, rows = adapter.noise([PROMPT], [1]), torch.tensor([0.7]), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        return adapter.velocity(net, x, t, adapter.prepare(net, adapter.encode([PROMPT])), rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_roles_share_the_one_base_and_differ_in_pointers(family: str, precision: str, opened: Make) -> None:
    policy = policy_of(opened(family, precision, lora_rank=2), precision)
    base = {name: p.data_ptr() for name, p in policy.net.named_parameters() if not p.requires_grad}
    trained = sum(p.numel() for p in policy.parameters.values())
    assert len(base) > 20
    for name, kept in policy.sets.items():
        assert all(".lora_" in key for key in kept)
        assert sum(value.numel() for value in kept.values()) == trained
        with policy.wearing(name) as net:
            worn = dict(net.named_parameters())
            assert {key: worn[key].data_ptr() for key in base} == base
            if name != "old" or precision == "fp32":  # the old policy follows slowly, so bf16 wears a rounded one
                assert all(worn[key].data_ptr() == value.data_ptr() for key, value in kept.items())
    old, reference = policy.sets["old"], policy.sets["reference"]
    assert {value.dtype for value in old.values()} == {torch.float32}
    assert {value.dtype for value in reference.values()} == {next(iter(policy.parameters.values())).dtype}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_stock_base_bit_for_bit(family: str, precision: str, opened: Make) -> None:
    adapter, stock = opened(family, precision, lora_rank=2), opened(family, precision, lora_rank=None)
    policy, base = policy_of(adapter, precision), stock.load(CPU)
    assert type(base) is stock.folder.transformer_class()
    expected = velocity(stock, base)
    with policy.wearing("reference") as net:
        assert torch.equal(velocity(adapter, net), expected)
    for name in (CURRENT, "teacher/t2i"):
        with policy.wearing(name) as net:
            assert not torch.equal(velocity(adapter, net), expected)


def test_the_copies_of_a_network_that_is_trained_as_a_whole_wait_on_the_cpu() -> None:
    """`meta` stands for the device: what is put there has no memory, and what came back would have no values."""
    nets = {whole: nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 2)).to("meta") for whole in (True, False)}
    nets[False][0].requires_grad_(False)
    for whole, net in nets.items():
        policy = Policy(net)
        policy.put("old", {n: torch.ones(p.shape) for n, p in policy.parameters.items()}, what="a set")
        policy.put("teacher/a", policy.sets["old"] if whole else {
            n: torch.ones(p.shape) for n, p in policy.parameters.items()
        }, what="a teacher", device=CPU)  # fmt: skip
        home = {name: {value.device.type for value in kept.values()} for name, kept in policy.sets.items()}
        assert home == {"old": {"cpu" if whole else "meta"}, "teacher/a": {"cpu"}}
        for name, kept in dict(policy.sets).items():
            with policy.wearing(name) as worn:
                assert {p.device.type for p in worn.parameters()} == {"meta"}
            with policy.on_device(name, torch.device("meta")), policy.wearing(name) as worn:
                there = policy.sets[name]
                assert all(p.data_ptr() == there[n].data_ptr() for n, p in worn.named_parameters() if n in there)
                assert {value.device.type for value in there.values()} == {"meta"}
            assert policy.sets[name] is kept
