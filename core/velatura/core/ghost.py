"""Tensors without numbers: a network of shapes and types alone runs forward and backward; what lives is counted.

A ghost network takes no memory and next to no time, whatever its size. Its operations allocate and free as they do with
numbers, so the most bytes that live at once are those that a device would need for the same operations.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KEPT = 2
"""Blocks of a kind that are run; each further one adds as much as the third."""
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that exist, from the moment in which an operation makes them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Count these at nothing, now and later."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = True

    def begin(self) -> int:
        """Forget the peak so far; the bytes that live now."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count what it made."""
        if func in INDEXING:
            args = (args[0], _as_places(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or tensor.device.type == "meta":  # ghosts say that they are on the CPU
            return
        size = storage.nbytes()
        self._seen[storage] = True
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.now -= size


class Ghost:
    """A network without numbers, on what looks like the CPU."""

    def __init__(self, net: nn.Module, dtype: torch.dtype, *, solid: bool = False) -> None:
        """Takes over `net`, which is on the meta device: its floating tensors become ghosts of `dtype`.

        `solid` makes them zeros instead, and runs all blocks: a small network is faster with numbers.
        """
        self.net = net
        self._mode = None if solid else FakeTensorMode(allow_non_fake_inputs=True)
        for module in net.modules():
            self._haunt(module, dtype)
        self._kinds = [] if solid else list(_kinds(net))

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A ghost of this shape."""
        if self._mode is None:
            return torch.zeros(shape, dtype=dtype)
        with self._mode:
            return torch.empty(shape, dtype=dtype)

    def adopt(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Another module on the meta device, as a ghost of the same house."""
        for part in module.modules():
            self._haunt(part, dtype)
        return module

    def most(self, run: Callable[[Live], int]) -> int:
        """The most bytes that `run` has at once beyond what it says lived at its start; the network is not counted.

        `run` is called with few blocks of each kind, and the bytes of a further block are added for all others: blocks
        of one kind have equal parameters, so each keeps the same for the backward pass.
        """
        few = {kind: KEPT for kind in range(len(self._kinds))}
        total = base = self._run(run, few)
        for kind, (_, places) in enumerate(self._kinds):
            if len(places) > KEPT:
                total += (len(places) - KEPT) * (self._run(run, few | {kind: KEPT + 1}) - base)
        return total

    def _run(self, run: Callable[[Live], int], blocks: dict[int, int]) -> int:
        with self._shortened(blocks), warnings.catch_warnings(), Live() as live:
            # torch looks at the gradient of whatever becomes a ghost
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            live.ignore(self.net.parameters())
            live.ignore(self.net.buffers())
            began = run(live)
            most: int = live.peak - began
            return most

    @contextmanager
    def _shortened(self, blocks: dict[int, int]) -> Iterator[None]:
        """The network with so many blocks of each kind."""
        whole = {name: self.net._modules[name] for name, _ in self._kinds}
        kept: dict[str, list[int]] = {name: [] for name in whole}
        for kind, (name, places) in enumerate(self._kinds):
            kept[name] += places[: blocks[kind]]
        try:
            for name, places in kept.items():
                stack: Any = whole[name]
                self.net._modules[name] = nn.ModuleList(stack[place] for place in sorted(places))
            yield
        finally:
            self.net._modules.update(whole)

    def _haunt(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Meta tensors of one module, wherever it keeps them, become ghosts."""
        for name, weight in module._parameters.items():
            if weight is not None:
                ghost = self.tensor(*weight.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(ghost, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kept = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = self.tensor(*buffer.shape, dtype=kept)
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, Tensor | list | tuple | dict):
                setattr(module, name, tree_map(self._if_meta, value))

    def _if_meta(self, value: Any) -> Any:
        meta = isinstance(value, Tensor) and value.device.type == "meta"
        return self.tensor(*value.shape, dtype=value.dtype) if meta else value


def _kinds(net: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """The stacks of blocks of `net`, each divided by the shapes of the blocks' parameters: name, and their places."""
    for name, part in net.named_children():
        if not isinstance(part, nn.ModuleList):
            continue
        places: dict[Any, list[int]] = {}
        for place, block in enumerate(part):
            shapes = tuple((key, tuple(weight.shape)) for key, weight in block.named_parameters())
            places.setdefault((type(block), shapes), []).append(place)
        for own in places.values():
            yield name, own


def _as_places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places where they are true: how many these are, a ghost could not know."""
    found: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += index.nonzero(as_tuple=True) if mask and index is not None else [index]
    return found
