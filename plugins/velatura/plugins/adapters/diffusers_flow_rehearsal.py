"""A stock pipeline played with a stand-in for its transformer: what it tells the network, and what it makes of answers.

A signature says which arguments a transformer takes, but not whether its time runs up or down, on which scale, or what
sign its output has. All of this is heard in a run of the stock pipeline whose transformer has no weights, keeps what it
is told, and answers with known numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Answer = Callable[[Tensor, int], Tensor]
"""(x [B ...], number of the call) -> what the stand-in predicts [B ...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One forward of the stand-in."""

    x: Tensor
    """[B ...] `hidden_states`."""
    time: Tensor
    """[B] `timestep`."""
    told: Mapping[str, Any]
    """All other arguments, by name."""
    answer: Tensor
    """[B ...] what it predicted."""


@dataclass(slots=True, kw_only=True)
class Heard:
    """What one run of a stock pipeline was heard to do."""

    calls: list[Call] = field(default_factory=list)
    """Of the stand-in, in order."""
    drawing: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `prepare_latents`."""
    encoded: Any = None
    """What `encode_prompt` returned."""
    decoded: Tensor | None = None
    """What the autoencoder was given."""
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0))
    """[K + 1] of the scheduler."""
    result: Any = None
    """Latents, or pictures where these were asked for."""

    @property
    def velocity(self) -> Tensor:
        """(x_1 - x_0) / (sigma_1 - sigma_0) of the first of several steps."""
        first, second = self.calls[0], self.calls[len(self.calls) // (len(self.sigmas) - 1)]
        way = second.x[: len(self.result)].float() - first.x[: len(self.result)].float()
        return way / (self.sigmas[1] - self.sigmas[0]).to(way.device)


def known_numbers(x: Tensor, call: int) -> Tensor:
    """Standard normal numbers, others in every call."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(call)).to(x)


def nothing(x: Tensor, call: int) -> Tensor:
    """A velocity of zero: the run ends where it began."""
    return torch.zeros_like(x)


def listen(
    pipe: Any, stand_in: StandIn, arguments: Mapping[str, Any], *, answer: Answer = known_numbers, encoded: Any = None
) -> Heard:
    """Run `pipe` with `arguments`; `encoded` stands in for what `encode_prompt` would return."""
    heard = Heard()
    transformer = pipe.transformer
    pipe.transformer = stand_in.network(heard, answer)
    try:
        with (
            _overheard(pipe, "encode_prompt", _keep_encoded(heard, encoded)),
            _overheard(pipe, "prepare_latents", _keep_drawing(heard)),
            _overheard(pipe.vae, "decode", _keep_decoded(heard)),
        ):
            heard.result = pipe(**arguments, return_dict=False)[0]
    finally:
        pipe.transformer = transformer
    heard.sigmas = pipe.scheduler.sigmas.float().cpu()
    return heard


@dataclass(frozen=True)
class StandIn:
    """A transformer without memory for weights, on the device and in the precision that the real one would have."""

    stock: Any
    """Its class."""
    meta: Any
    """One of it on the meta device; made once, as large networks take seconds."""
    device: torch.device
    dtype: torch.dtype

    def network(self, heard: Heard, answer: Answer) -> Any:
        """`meta` with a forward that writes to `heard`."""
        signature, device, dtype = inspect.signature(self.stock.forward), self.device, self.dtype

        def forward(self: Any, *args: Any, **named: Any) -> Any:
            told = dict(signature.bind(self, *args, **named).arguments)
            told.pop("self", None)
            x, time = told.pop("hidden_states"), told.pop("timestep")
            out = answer(x, len(heard.calls))
            heard.calls.append(Call(x=x, time=time, told=told, answer=out))
            return (out,) if told.get("return_dict") is False else SimpleNamespace(sample=out)

        body = {
            "forward": forward,
            "device": property(lambda self: device),
            "dtype": property(lambda self: dtype),
        }
        self.meta.__class__ = type(self.stock.__name__, (self.stock,), body)
        return self.meta.train(False)


def bound(function: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments out of `known` that `function` has."""
    return {name: known[name] for name in inspect.signature(function).parameters if name in known}


def moved(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, Mapping):
        return {name: moved(one, device) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(one, device) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _overheard(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)


def _keep_drawing(heard: Heard) -> Callable[[Any], Any]:
    def wrap(original: Any) -> Any:
        def prepare_latents(*args: Any, **named: Any) -> Any:
            heard.drawing = inspect.signature(original).bind(*args, **named).arguments
            return original(*args, **named)

        return prepare_latents

    return wrap


def _keep_encoded(heard: Heard, known: Any) -> Callable[[Any], Any]:
    def wrap(original: Any) -> Any:
        def encode_prompt(*args: Any, **named: Any) -> Any:
            heard.encoded = original(*args, **named) if known is None else known
            return heard.encoded

        return encode_prompt

    return wrap


def _keep_decoded(heard: Heard) -> Callable[[Any], Any]:
    def wrap(original: Any) -> Any:
        def decode(z: Tensor, *args: Any, **named: Any) -> Any:
            heard.decoded = z
            return original(z, *args, **named)

        return decode

    return wrap
