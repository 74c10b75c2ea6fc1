"""What a check is: a statement about one component, called without arguments, that raises when it does not hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from velatura.core.components import Component
from velatura.core.types import Context, Prompt
from velatura.testing.samples import make_prompts


class CheckFailure(AssertionError):
    """A component does not do what its contract says."""


class NotChecked(Exception):
    """A check could not be made; says why. Neither passed nor failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The component under a check, and what it is tried on."""

    component: type[Component[Any]]
    prompts: tuple[Prompt, ...] = ()
    """What rewards, evaluators and adapters are asked about; empty stands for plain ones."""

    def unready(self) -> Any:
        """One that was made and not set up.

        Raises:
            NotChecked: the defaults do not make one, and the class has no `example` of its own.
        """
        with self._explained():
            return self.component.example()

    def ready(self) -> Any:
        """One that was made and set up on the CPU; `NotChecked` as `unready`. Nothing is downloaded from a hub."""
        with self._explained(), without_hub():
            component = self.component.example()
            component.setup(self.context())
            return component

    def context(self) -> Context:
        """On the CPU, with an empty cache, in the current folder."""
        cache = Path(mkdtemp(prefix="velatura-check-"))
        return Context(device=torch.device("cpu"), cache=cache, seed=0, base=Path.cwd())

    def asked(self) -> Sequence[Prompt]:
        """Three or more prompts, two of them of one text."""
        return self.prompts or (*make_prompts(4), *make_prompts(2, task="edit"))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        own = self.component.example.__func__ is not Component.example.__func__  # type: ignore[attr-defined]
        try:
            yield
        except Exception as error:
            if own:
                raise
            raise NotChecked(
                f"its default options do not give one that can be tried ({_short(error)}); give the class `example()`"
            ) from error


def _short(error: Exception) -> str:
    """Why, on one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors())
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def without_hub() -> Iterator[None]:
    """Nothing is fetched from a model hub meanwhile."""
    from unittest.mock import patch

    import huggingface_hub.constants as constants

    with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}), patch.object(constants, "HF_HUB_OFFLINE", True):
        yield


Statement = Callable[[Subject], None]
STATEMENTS: dict[str, list[Statement]] = {}
"""Kind -> its checks, in order; `""` for all kinds."""


def check(kind: str = "") -> Callable[[Statement], Statement]:
    """Make a function a check of `kind`, of all kinds by default. Its name is that of the check."""

    def register(statement: Statement) -> Statement:
        STATEMENTS.setdefault(kind, []).append(statement)
        return statement

    return register


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One statement about one component. Call it: it raises when the statement does not hold."""

    component: str
    """As a recipe names it; the plugin's name, for what is said of all of it."""
    kind: str
    """Of the component; empty for a plugin."""
    name: str
    """Words joined by `_`."""
    run: Callable[[], None]

    def __call__(self) -> None:
        """Make the check.

        Raises:
            CheckFailure: the component does not do what its contract says.
            NotChecked: it could not be tried.
        """
        self.run()


def require(holds: object, message: str) -> None:
    """Fail with `message` unless something holds."""
    if not holds:
        raise CheckFailure(message)


def require_close(actual: Tensor, expected: Tensor, message: str, tolerance: float = 1e-4) -> None:
    """Fail unless two tensors agree up to `tolerance` of the larger one's greatest value."""
    require(actual.shape == expected.shape, f"{message}: shapes {list(actual.shape)} and {list(expected.shape)}")
    if actual.numel() == 0:
        return
    gap = float((actual.detach().double() - expected.detach().double()).abs().max())
    size = max(1.0, float(expected.detach().double().abs().max()))
    require(gap <= tolerance * size, f"{message}: they differ by up to {gap:.3g}")


def require_finite(values: Tensor, what: str) -> None:
    """Fail where something is NaN or infinite."""
    require(bool(torch.isfinite(values).all()), f"{what} is not finite: {values.flatten()[:8].tolist()}")


@contextmanager
def untouched(what: str, *tensors: Tensor) -> Iterator[None]:
    """Fail where one of the tensors is changed in place meanwhile."""
    before = [tensor.clone() for tensor in tensors]
    yield
    same = all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    require(same, f"{what} changes what it is given; work on a copy (`.clone()`)")
