"""What a check is: a statement about one component, called without arguments, that raises when it does not hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from velatura.core.base_settings import Ref
from velatura.core.build import options
from velatura.core.components import Component
from velatura.core.types import Context, Prompt, Sample
from velatura.testing.samples import make_prompts, make_samples


class CheckFailure(AssertionError):
    """A component does not do what its contract says."""


class NotChecked(Exception):
    """A check could not be made; says why. Neither passed nor failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a component is tried with, where its defaults do not do: weights, a file, a server, pictures of its own."""

    options: Mapping[str, Any] | None = None
    """As under `with:` in a recipe; relative paths are seen from the current folder. None stands for `example()`."""
    prompts: Sequence[Prompt] = ()
    """What rewards, evaluators, adapters and judge models are asked about; empty stands for those of `samples`, or for
    those of all components of the plugin."""
    samples: Sequence[Sample] = ()
    """What rewards, evaluators and judge models look at; empty stands for drawn ones, `make_samples(prompts)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The component under a check, and what it is tried on."""

    component: type[Component[Any]]
    trial: Trial = field(default_factory=Trial)

    def unready(self) -> Any:
        """One that was made and not set up.

        Raises:
            NotChecked: the defaults do not make one, and neither does the class by `example`, nor the trial.
            RecipeError: the options of the trial are wrong.
        """
        with self._explained():
            return self._made()

    def ready(self) -> Any:
        """One that was made and set up on the CPU; raises as `unready`. Nothing is downloaded from a hub."""
        with self._explained(), without_hub():
            component = self._made()
            component.setup(self.context())
            return component

    def _made(self) -> Component[Any]:
        if self.trial.options is None:
            return self.component.example()
        given = {"use": self.component.name, "with": dict(self.trial.options)}
        return self.component(options(self.component, Ref.model_validate(given)))

    def context(self) -> Context:
        """On the CPU, with an empty cache, in the current folder."""
        cache = Path(mkdtemp(prefix="velatura-check-"))
        return Context(device=torch.device("cpu"), cache=cache, seed=0, base=Path.cwd())

    def asked(self) -> Sequence[Prompt]:
        """Those of the trial, or plain ones: three or more, two of them of one text."""
        if self.trial.prompts:
            return self.trial.prompts
        own = {sample.prompt.id: sample.prompt for sample in self.trial.samples}
        return tuple(own.values()) or (*make_prompts(4), *make_prompts(2, task="edit"))

    def pictures(self, *, of: int | None = None, per_prompt: int = 3) -> list[Sample]:
        """Those of the trial, or drawn ones, `per_prompt` for each of the first `of` prompts."""
        return list(self.trial.samples) or make_samples(self.asked()[:of], per_prompt=per_prompt)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        own = self.trial.options is not None or (
            self.component.example.__func__ is not Component.example.__func__  # type: ignore[attr-defined]
        )
        try:
            yield
        except Exception as error:
            if own:
                raise
            raise NotChecked(
                f"its default options do not give one that can be tried ({_short(error)}); give the class `example()`, "
                "or the check options: `check(Trial(options={...}))`"
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
    run: Callable[[Trial | None], None]

    def __call__(self, trial: Trial | None = None) -> None:
        """Make the check.

        Args:
            trial: what the component is tried with, where its defaults do not do.

        Raises:
            CheckFailure: the component does not do what its contract says.
            NotChecked: it could not be tried.
            RecipeError: the options of `trial` are wrong.
        """
        self.run(trial)


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
