"""What follows from rehearsals of a stock pipeline: its time, its sign, its guidance rule, its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from velatura.api import VelaturaError
from velatura.plugins.adapters.diffusers_flow_rehearsal import Heard

Play = Callable[..., Heard]
"""(**arguments of the pipeline's call) -> what was heard; all of it has a default."""
SCALE = 3.0
"""Any guidance scale that is not 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a stock pipeline uses its transformer, at every size and for every prompt."""

    time: str
    """Name of the rule in `clocks`."""
    sign: int
    """1 where the transformer predicts eps - x_0, -1 where it predicts x_0 - eps."""
    shared: frozenset[str]
    """Tensor arguments without a batch axis."""
    repeated: frozenset[str]
    """Lists with an entry per row."""
    guidance: Guidance
    """Its unconditional branch."""
    encoded: Any
    """What `encode_prompt` returned in a rehearsal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Where the unconditional branch is, and what is made of it; `missing` says why it cannot be had."""

    off: Mapping[str, float]
    """Argument of the call that turns guidance off."""
    on: Mapping[str, float]
    """The same, on; empty where there is no unconditional branch."""
    null: int = 0
    """Which branch it is, 0 or 1."""
    rescaled: bool = False
    """Whether the guided velocity gets the length of the conditional one, along the last axis."""
    missing: str = ""


def clocks(config: Mapping[str, Any]) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Every way to tell a transformer the time t, 1 = noise, as pipelines compute it."""
    scale = config.get("timestep_scale", 1.0)
    return {
        "1000 t": lambda t: t * 1000,
        "t": lambda t: t * 1000 / 1000,
        "1 - t": lambda t: 1 - t * 1000 / 1000,
        "1000 - 1000 t": lambda t: 1000 - t * 1000,
        "1000 t timestep_scale": lambda t: t * 1000 * scale,
    }


def branches(heard: Heard) -> list[dict[str, Any]]:
    """What the transformer was told at the first step, a branch each; tensors keep their batch axis."""
    calls, rows = heard.calls, len(heard.calls[0].x)
    if rows == 1:
        return [dict(call.told) for call in calls[: len(calls) // (len(heard.sigmas) - 1)]]
    return [{name: _row(value, i, rows) for name, value in calls[0].told.items()} for i in range(rows)]


def learn(play: Play, config: Mapping[str, Any], knobs: tuple[str, ...]) -> Habits:
    """Rehearse until everything is known.

    Raises:
        VelaturaError: the pipeline does something that cannot be followed; the message says what.
    """
    off, on = _switch(play, knobs)
    quiet = play(**off, steps=3)
    _check_steady(quiet)
    _check_latents(quiet)
    shared, repeated = _axes(quiet, play(**off, num_images_per_prompt=2))
    _check_plain(quiet, play(prompt="an old lighthouse above a grey sea", **off), repeated)
    return Habits(
        time=_clock(quiet, config),
        sign=_sign(play(**off)),
        shared=shared,
        repeated=repeated,
        guidance=_guidance(play, off, on, quiet),
        encoded=quiet.encoded,
    )


def _switch(play: Play, knobs: tuple[str, ...]) -> tuple[dict[str, float], dict[str, float]]:
    """Arguments that turn guidance off and on."""
    for knob in knobs:
        for value in (1.0, 0.0):
            if len(branches(play(**{knob: value}))) == 1 and len(branches(play(**{knob: SCALE}))) == 2:
                return {knob: value}, {knob: SCALE}
    if (found := len(branches(play()))) != 1:
        raise VelaturaError(
            f"it evaluates its transformer in {found} branches, and none of its arguments "
            f"({', '.join(knobs) or 'it has no guidance scale'}) turns that off."
        )
    return {}, {}


def _check_steady(heard: Heard) -> None:
    first, *others = heard.calls
    for call in others:
        for name, value in first.told.items():
            if not same(value, call.told.get(name)):
                raise VelaturaError(f"it tells its transformer another {name!r} at every step.")


def _check_latents(heard: Heard) -> None:
    call, drawn = heard.calls[0], heard.result
    if not isinstance(call.x, Tensor) or call.x.shape != drawn.shape:
        given = tuple(call.x.shape) if isinstance(call.x, Tensor) else type(call.x).__name__
        raise VelaturaError(
            f"its transformer's 'hidden_states' are {given}, where its latents are {tuple(drawn.shape)}: something "
            "else goes in beside them."
        )
    if not heard.drawing:
        raise VelaturaError("it does not draw its noise with `prepare_latents`.")


def _axes(one: Heard, two: Heard) -> tuple[frozenset[str], frozenset[str]]:
    """Names of tensors without a batch axis, and of lists with an entry per row."""
    shared, repeated = set(), set()
    for name, value in one.calls[0].told.items():
        other = two.calls[0].told[name]
        if isinstance(value, Tensor):
            if value.shape == other.shape:
                shared.add(name)
            elif len(value) != 1 or other.shape != (2, *value.shape[1:]):
                raise VelaturaError(
                    f"argument {name!r} of its transformer is {tuple(value.shape)} for one picture, and "
                    f"{tuple(other.shape)} for two."
                )
        elif isinstance(value, list) and other == value * 2 and value:
            repeated.add(name)
    return frozenset(shared), frozenset(repeated)


def _check_plain(one: Heard, other: Heard, repeated: frozenset[str]) -> None:
    """Arguments that are no tensors may depend on nothing but the size."""
    for name, value in one.calls[0].told.items():
        if isinstance(value, Tensor):
            continue
        if _holds_tensor(value):
            raise VelaturaError(f"argument {name!r} of its transformer is a {type(value).__name__} of tensors.")
        if not same(value, other.calls[0].told[name]):
            raise VelaturaError(f"argument {name!r} of its transformer depends on the prompt and is no tensor.")


def _clock(heard: Heard, config: Mapping[str, Any]) -> str:
    told = torch.cat([call.time.reshape(-1)[:1] for call in heard.calls]).cpu()
    close = 0.0 if told.dtype == torch.float32 else 2**-7
    for name, rule in clocks(config).items():
        if told.is_floating_point() and torch.allclose(rule(heard.sigmas[:-1]), told.float(), rtol=close, atol=close):
            return name
    raise VelaturaError(
        f"it tells its transformer the times {[round(value, 4) for value in told.tolist()]} at noise levels "
        f"{[round(value, 4) for value in heard.sigmas[:-1].tolist()]}, which is none of {', '.join(clocks(config))}."
    )


def _sign(heard: Heard) -> int:
    for sign in (1, -1):
        if _alike(heard.velocity, sign * heard.calls[0].answer):
            return sign
    raise VelaturaError("its step does not follow what its transformer predicts: it is no Euler step of a velocity.")


def _guidance(play: Play, off: Mapping[str, float], on: Mapping[str, float], quiet: Heard) -> Guidance:
    if not on:
        return Guidance(
            off=off,
            on=on,
            missing="no scale makes it evaluate an unconditional branch, as in guidance-distilled models",
        )
    heard = play(prompt="a cat", negative_prompt="a dog", **on)
    alone = branches(play(prompt="a cat", **off))[0]
    cond = [i for i, branch in enumerate(branches(heard)) if all(same(alone[name], branch.get(name)) for name in alone)]
    if len(cond) != 1:
        return Guidance(off=off, on={}, missing="its two branches cannot be told apart")
    null = 1 - cond[0]
    answers = torch.cat([call.answer for call in heard.calls])
    rules = {rescaled: guided(answers[cond], answers[[null]], SCALE, rescaled) for rescaled in (False, True)}
    for rescaled, wanted in rules.items():
        if _alike(heard.velocity.abs(), wanted.abs()):
            return Guidance(off=off, on=on, null=null, rescaled=rescaled)
    return Guidance(off=off, on={}, missing="its guidance rule is not null + scale (cond - null)")


def guided(cond: Tensor, null: Tensor, scale: Tensor | float, rescaled: bool) -> Tensor:
    """null + scale (cond - null); `rescaled` gives it the length of `cond` along the last axis."""
    v = null + scale * (cond - null)
    if rescaled:
        v = v * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(v, dim=-1, keepdim=True))
    return v


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, tensors within them included."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _row(value: Any, i: int, rows: int) -> Any:
    batched = isinstance(value, Tensor | list) and len(value) == rows
    return value[i : i + 1] if batched else value


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(one) for one in value.values())
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(_holds_tensor(one) for one in value))


def _alike(one: Tensor, other: Tensor) -> bool:
    rough = other.dtype != torch.float32
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), rtol=0.05 if rough else 1e-3, atol=0.1 if rough else 1e-3
    )
