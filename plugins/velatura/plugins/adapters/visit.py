"""Frozen networks that wait on the CPU come to a device for as long as they are used, and nothing is copied back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[dict[str, Tensor | None], str]
"""Where a module keeps a tensor."""


class Visit:
    """Tensors of modules on a device. The ones on the CPU are kept meanwhile and stand in their old places afterwards:
    a frozen tensor has not changed, so going back costs neither time nor memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waiting: list[tuple[Place, Tensor]] = []

    def bring(self, module: nn.Module) -> None:
        """Copy what is not on the device to it; tensors that are one stay one."""
        copies: dict[int, Tensor] = {}
        for (kept, name), tensor in _tensors(module):
            if self._is_there(tensor):
                continue
            if id(tensor) not in copies:
                copies[id(tensor)] = _as(tensor, tensor.detach().to(self.device, non_blocking=True))
            self._waiting.append(((kept, name), tensor))
            kept[name] = copies[id(tensor)]

    def leave(self, modules: list[nn.Module]) -> None:
        """Put back what waited. What a forward made new in its place goes to the CPU."""
        for (kept, name), tensor in reversed(self._waiting):
            kept[name] = tensor
        self._waiting.clear()
        for module in modules:
            for (kept, name), tensor in _tensors(module):
                if self.device.type != "cpu" and self._is_there(tensor):
                    kept[name] = _as(tensor, tensor.detach().to("cpu"))

    def _is_there(self, tensor: Tensor) -> bool:
        """`cuda` is any of them."""
        return tensor.device.type == self.device.type and self.device.index in (None, tensor.device.index)


def _tensors(module: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    for part in module.modules():
        places: tuple[Any, ...] = (part._parameters, part._buffers)
        for kept in places:
            for name, tensor in list(kept.items()):
                if tensor is not None:
                    yield (kept, name), tensor


def _as(model: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=model.requires_grad) if isinstance(model, nn.Parameter) else value
