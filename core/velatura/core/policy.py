"""One network and the sets of weights it can wear: old policy, reference, EMA, teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor, nn

from velatura.core.checkpoint import match_tensors

CURRENT = "current"


class Policy:
    """The trained network, with other weight sets that are switched in by pointer and never copied into it.

    Only what is trained is kept more than once: with LoRA a set is a few megabytes, and the reference is the
    untrained adapter, which adds exactly nothing.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.sets: dict[str, dict[str, Tensor]] = {}
        self._clock = count(1)
        self._version: dict[str, int] = {CURRENT: 0}

    def weights(self) -> dict[str, Tensor]:
        """The current trained tensors, detached, not copied."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def remember(self, name: str) -> None:
        """Keep a copy of the current weights under `name`, in fp32: a slow average would stand still in bf16."""
        self.sets[name] = {key: value.to(torch.float32, copy=True) for key, value in self.weights().items()}
        self._version[name] = self._version[CURRENT]

    def put(self, name: str, tensors: Mapping[str, Tensor], *, what: str, device: torch.device | None = None) -> None:
        """Keep `tensors` as the set `name`, after checking that they fit this network.

        Raises:
            CheckpointError: they are of another model; the message names the first difference.
        """
        match_tensors(self.weights(), tensors, what=what)
        reference = self.weights()
        self.sets[name] = {key: tensors[key].float().to(device or value.device) for key, value in reference.items()}
        self._version[name] = next(self._clock)

    def load(self, tensors: Mapping[str, Tensor], *, what: str) -> None:
        """Overwrite the current weights in place.

        Raises:
            CheckpointError: the tensors are of another model.
        """
        match_tensors(self.weights(), tensors, what=what)
        with torch.no_grad():
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
        with torch.no_grad():
            for key, value in self.weights().items():
                kept = self.sets[name][key]
                if decay == 0:
                    kept.copy_(value)
                else:
                    kept.lerp_(value.to(kept.dtype), 1 - decay)
        self._version[name] = self._version[CURRENT] if decay == 0 else next(self._clock)

    def mark_same(self, a: str, b: str) -> None:
        """Say that set `a` holds the same weights as set `b` (used when a checkpoint is restored)."""
        self._version[a] = self._version[b]

    @contextmanager
    def wearing(self, name: str) -> Iterator[nn.Module]:
        """The network with the weights of `name`; no gradient inside, and never around a backward pass."""
        if name == CURRENT or self.same(name, CURRENT):
            with torch.no_grad():
                yield self.net
            return
        with self.forced(name) as net:
            yield net

    @contextmanager
    def forced(self, name: str) -> Iterator[nn.Module]:
        """Like `wearing`, but without trusting that sets known to be equal are (the self-check asks)."""
        if name == CURRENT:
            with torch.no_grad():
                yield self.net
            return
        worn = self.sets[name]
        own = {key: p.data for key, p in self.parameters.items()}
        try:
            for key, parameter in self.parameters.items():
                parameter.data = worn[key].to(parameter.dtype)
            with torch.no_grad():
                yield self.net
        finally:
            for key, parameter in self.parameters.items():
                parameter.data = own[key]

    @contextmanager
    def on_device(self, name: str, device: torch.device) -> Iterator[None]:
        """Bring a set from the CPU for as long as it is worn; the CPU copy stays where it is."""
        kept = self.sets[name]
        if all(value.device == device for value in kept.values()):
            yield
            return
        self.sets[name] = {key: value.to(device, non_blocking=True) for key, value in kept.items()}
        try:
            yield
        finally:
            self.sets[name] = kept
