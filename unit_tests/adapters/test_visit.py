"""Encoders and autoencoders come to a device and leave it; the device without numbers stands for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from velatura.plugins.adapters.visit import Visit

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Where each copy between devices went."""

    def __init__(self) -> None:
        super().__init__()
        self.to: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.to.append(torch.device((kwargs or {})["device"]).type)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def net() -> nn.Module:
    """Tied weights and a buffer, as text encoders have them."""
    made = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7, affine=False))
    made[1].weight = made[0].weight
    return made.requires_grad_(False).eval()


def test_what_comes_back_is_what_waited_and_is_not_copied(net: nn.Module) -> None:
    before = {name: (id(t), t.data_ptr()) for name, t in net.state_dict(keep_vars=True).items()}
    visit = Visit(META)
    with Copies() as copies:
        visit.bring(net)
        assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"meta"}
        assert net[0].weight is net[1].weight
        assert copies.to == ["meta"] * 4, "the tied weight and three buffers, once each"
        visit.bring(net)
        assert len(copies.to) == 4, "what is there is not brought again"
        visit.leave([net])
    assert "cpu" not in copies.to
    assert {name: (id(t), t.data_ptr()) for name, t in net.state_dict(keep_vars=True).items()} == before
    assert not net[0].weight.requires_grad


def test_a_part_that_is_made_for_the_device_itself_is_left_alone(net: nn.Module) -> None:
    before = {name: t.data_ptr() for name, t in net.state_dict().items()}
    visit = Visit(torch.device("cpu"))
    with Copies() as copies:
        visit.bring(net)
        visit.leave([net])
    assert copies.to == []
    assert {name: t.data_ptr() for name, t in net.state_dict().items()} == before


def test_several_parts_leave_together(net: nn.Module) -> None:
    other = nn.Linear(3, 3)
    visit = Visit(META)
    for part in (net, other):
        visit.bring(part)
    visit.leave([net, other])
    assert {t.device.type for part in (net, other) for t in part.parameters()} == {"cpu"}
    assert other.weight.requires_grad
