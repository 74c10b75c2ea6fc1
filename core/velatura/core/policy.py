"""One network and the sets of weights it can wear: old policy, reference, EMA, teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count

import torch
from torch import Tensor, nn

from velatura.core.checkpoint import match_tensors

CURRENT = "current"
START = "start"
"""Equal to `CURRENT`, in `Policy.same`, as long as no weight has moved since the run began; it has no tensors."""


class Policy:
    """The trained network, with other weight sets that are switched in by pointer and never copied into it.

    Only what is trained is kept more than once. With LoRA a set is a few megabytes beside the one base, and the
    reference is the untrained adapter, which adds exactly nothing. Sets of a network that is trained as a whole are as
    large as the network, so they wait on the CPU until they are worn.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.sets: dict[str, dict[str, Tensor]] = {}
        self.gathered: Callable[..., AbstractContextManager[None]] = _always_there
        """`Engine.whole` of the engine that may have dealt out the weights."""
        self._shapes = {name: torch.empty(p.shape, device="meta") for name, p in self.parameters.items()}
        self._clock = count(1)
        self._version: dict[str, int] = {CURRENT: 0, START: 0}
        trained = sum(p.numel() for p in self.parameters.values())
        self.whole = 2 * trained > sum(p.numel() for p in net.parameters())
        """Whether most of the network is trained, so that a set is a copy of it."""

    def weights(self) -> dict[str, Tensor]:
        """The current trained tensors, detached, not copied. Call it inside `gathered`."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def remember(self, name: str, *, follows: bool = True) -> None:
        """Keep a copy of the current weights under `name`. One that `follows` is fp32, because a slow average would
        stand still in bf16; one that stays is in the network's own precision, and so is worn without any copy."""
        with self.gathered():
            self.sets[name] = {
                key: value.to(self._home(value), torch.float32 if follows else value.dtype, copy=True)
                for key, value in self.weights().items()
            }
        self._version[name] = self._version[CURRENT]

    def put(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        what: str,
        device: torch.device | None = None,
        follows: bool = False,
    ) -> None:
        """Keep `tensors` as the set `name`, after checking that they fit this network; `follows` as in `remember`.

        Raises:
            CheckpointError: they are of another model; the message names the first difference.
        """
        match_tensors(self._shapes, tensors, what=what)
        self.sets[name] = {
            key: tensors[key].to(device or self._home(value), torch.float32 if follows else value.dtype)
            for key, value in self.parameters.items()
        }
        self._version[name] = next(self._clock)

    def forget(self, name: str) -> None:
        """Keep the set `name` no longer."""
        del self.sets[name], self._version[name]

    def _home(self, weight: Tensor) -> torch.device:
        """Where a set waits."""
        return torch.device("cpu") if self.whole else weight.device

    def load(self, tensors: Mapping[str, Tensor], *, what: str) -> None:
        """Overwrite the current weights in place.

        Raises:
            CheckpointError: the tensors are of another model.
        """
        match_tensors(self._shapes, tensors, what=what)
        with self.gathered(write=True), torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        self.changed()

    def changed(self) -> None:
        """Say that the current weights moved."""
        self._version[CURRENT] = next(self._clock)

    def version(self, name: str) -> int:
        """Equal for two sets exactly when they are known to hold equal weights."""
        return self._version[name]

    def same(self, a: str, b: str) -> bool:
        """Whether two sets are known to hold equal weights, so that one velocity serves both."""
        return self.version(a) == self.version(b)

    def follow(self, name: str, decay: float) -> None:
        """name <- decay * name + (1 - decay) * current."""
        if self.same(name, CURRENT):
            return
        with self.gathered(), torch.no_grad():
            for key, value in self.weights().items():
                kept = self.sets[name][key]
                if decay == 0:
                    kept.copy_(value)
                else:
                    kept.lerp_(value.to(kept), 1 - decay)
        self._version[name] = self._version[CURRENT] if decay == 0 else next(self._clock)

    def mark_same(self, a: str, b: str) -> None:
        """Say that set `a` holds the same weights as set `b` (used when a checkpoint is restored)."""
        self._version[a] = self._version[b]

    @contextmanager
    def wearing(self, name: str) -> Iterator[nn.Module]:
        """The network with the weights of `name`; no gradient inside, and never around a backward pass."""
        if name == CURRENT or self.same(name, CURRENT):
            with self.gathered(), torch.no_grad():
                yield self.net
            return
        with self.forced(name) as net:
            yield net

    @contextmanager
    def forced(self, name: str) -> Iterator[nn.Module]:
        """Like `wearing`, but without trusting that sets known to be equal are (the self-check asks)."""
        if name == CURRENT:
            with self.gathered(), torch.no_grad():
                yield self.net
            return
        with self.gathered(), self._lent(self.sets[name]), torch.no_grad():
            yield self.net

    @contextmanager
    def _lent(self, worn: Mapping[str, Tensor]) -> Iterator[None]:
        """Other tensors in the places of the trained ones."""
        own = {key: p.data for key, p in self.parameters.items()}
        try:
            for key, parameter in self.parameters.items():
                parameter.data = worn[key].to(parameter)
            yield
        finally:
            for key, parameter in self.parameters.items():
                parameter.data = own[key]

    @contextmanager
    def on_device(self, name: str, device: torch.device) -> Iterator[None]:
        """Bring a set to the device, in the network's precision, for as long as it is worn; what is kept stays where
        and as it is."""
        if self.same(name, CURRENT):
            yield
            return
        kept = self.sets[name]
        self.sets[name] = {
            key: value.to(device, self.parameters[key].dtype, non_blocking=True) for key, value in kept.items()
        }
        try:
            yield
        finally:
            self.sets[name] = kept


def _always_there(*, write: bool = False) -> AbstractContextManager[None]:
    """Without an engine that deals them out, weights are whole."""
    return nullcontext()
