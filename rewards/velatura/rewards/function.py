"""The reward `function`: any Python callable in a file beside the recipe."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from velatura.api import Context, Options, RewardModel, Sample, Scores, Status, VelaturaError
from velatura.core.errors import cause, suggest
from velatura.core.plugin import import_file

Outcome = tuple[float, Status, str]
"""Value, status, reason."""
NOT_APPLICABLE: Outcome = (0.0, Status.NOT_APPLICABLE, "the function returned None")
FLAWED: Outcome = (0.0, Status.FAILED, "the picture holds values that are not finite")


class FunctionOptions(Options):
    """Which function, and how it is called."""

    file: str = Field(min_length=1, description="Python file, seen from the recipe, like `redness.py`.")
    call: str = Field(min_length=1, description="Name of the function in it.")
    batch: bool = Field(
        False,
        description="Call it once for many pictures, `f(images, prompts)` with two lists, in place of `f(image, "
        "prompt)`; it returns one score for each.",
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="Further arguments, by name.")

    @field_validator("file")
    @classmethod
    def _is_python(cls, file: str) -> str:
        if not file.endswith(".py"):
            raise ValueError(f"{file!r} is not a .py file")
        return file


class Function(RewardModel[FunctionOptions]):
    """What a function of your own says of a picture; higher is better, on any scale.

    `f(image, prompt) -> float | None`, image `3 H W` RGB in [0, 1] and fp32, prompt a `velatura.api.Prompt`; None means
    that the function has nothing to say of this picture. With `batch`: `f(images, prompts)`, two lists of one length,
    returns that many.

    An exception, a NaN, an infinite number, or something that is no number is a failure of that picture with its
    reason. When a call for many pictures raises or returns another number of scores, each picture is tried alone.
    """

    name = "function"
    _function: Callable[..., Any] | None = None
    _at = ""

    def setup(self, context: Context) -> None:
        """Import the file and find the function.

        Raises:
            VelaturaError: the file is missing or broken, has no such function, or it cannot be called like that.
        """
        path = context.resolve(self.options.file)
        if not path.is_file():
            raise VelaturaError(f"reward 'function': there is no file {str(path)!r}.{_neighbours(path)}")
        self._at = str(path)
        self._function = _found(path, self.options.call)
        _require_callable(self._function, path, self.options)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B], whatever range the function has."""
        outcomes = [FLAWED] * len(samples)
        whole = [i for i, sample in enumerate(samples) if bool(torch.isfinite(sample.image).all())]
        for i, made in zip(whole, self._outcomes([samples[i] for i in whole]), strict=True):
            outcomes[i] = made
        return Scores(
            values=torch.tensor([value for value, _, _ in outcomes], dtype=torch.float32),
            status=tuple(status for _, status, _ in outcomes),
            reasons=tuple(reason for _, _, reason in outcomes),
        )

    def _outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One for each. When a call for many fails, they are shown one by one: a bad one spoils no other."""
        if not self.options.batch or not samples:
            return [self._alone(sample) for sample in samples]
        try:
            answers = self._called([_picture(s) for s in samples], [s.prompt for s in samples])
            return [outcome(answer, self.options.call) for answer in _as_list(answers, len(samples))]
        except Exception as error:
            if len(samples) > 1:
                return [made for sample in samples for made in self._outcomes([sample])]
            return [(0.0, Status.FAILED, self._raised(error))]

    def _alone(self, sample: Sample) -> Outcome:
        try:
            answer = self._called(_picture(sample), sample.prompt)
        except Exception as error:
            return 0.0, Status.FAILED, self._raised(error)
        return outcome(answer, self.options.call)

    def _called(self, images: Any, prompts: Any) -> Any:
        if self._function is None:
            raise VelaturaError("reward 'function' was not set up")
        with torch.no_grad():
            return self._function(images, prompts, **self.options.arguments)

    def _raised(self, error: Exception) -> str:
        """The exception, and the last line of the function's file that it passed through."""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self._at]
        where = f" ({Path(self._at).name}, line {lines[-1]})" if lines else ""
        return f"{type(error).__name__}: {error}{where}"


def outcome(answer: object, name: str) -> Outcome:
    """What a function's answer for one picture is worth. Numbers of Python, numpy and torch count; bool does not."""
    if answer is None:
        return NOT_APPLICABLE
    if isinstance(answer, np.generic) or (isinstance(answer, Tensor) and answer.numel() == 1):
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        kind = type(answer).__name__
        return 0.0, Status.FAILED, f"{name} returned {kind} ({_short(answer)}) in place of a float or None"
    if not abs(answer) <= torch.finfo(torch.float32).max:
        return 0.0, Status.FAILED, f"{name} returned {answer}, which is not a finite number (fp32)"
    return float(answer), Status.OK, ""


def _as_list(answers: Any, count: int) -> list[Any]:
    """One answer for each of `count` pictures.

    Raises:
        ValueError: it is not so many.
    """
    if isinstance(answers, str | bytes | dict) or not hasattr(answers, "__len__") or not hasattr(answers, "__iter__"):
        raise ValueError(
            f"it returned {type(answers).__name__} ({_short(answers)}) in place of a list of {count} scores"
        )
    made = list(answers)
    if len(made) != count:
        raise ValueError(f"it returned {len(made)} scores for {count} pictures")
    return made


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _picture(sample: Sample) -> Tensor:
    """The picture as a copy: what the function does to it harms nobody."""
    return sample.image.detach().to(device="cpu", dtype=torch.float32, copy=True)


def _neighbours(path: Path) -> str:
    """What there is in place of a file that is missing."""
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either; `file` is seen from the recipe."
    names = [other.name for other in path.parent.glob("*.py")]
    return suggest(path.name, names) if names else " Paths start at the folder of the recipe."


@lru_cache(maxsize=64)
def _module(path: Path, changed: int) -> ModuleType:
    """The file, imported once for all rewards of it; again after it was changed."""
    try:
        return import_file(path)
    except (Exception, SystemExit) as error:
        raise VelaturaError(f"reward 'function': {path} does not import: {cause(error)}") from error


def _found(path: Path, call: str) -> Callable[..., Any]:
    module = _module(path, path.stat().st_mtime_ns)
    found = getattr(module, call, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    there = sorted(name for name, value in vars(module).items() if _is_own(value, module) and not name.startswith("_"))
    what = f"{call!r} is no function but {type(found).__name__}" if hasattr(module, call) else f"there is no {call!r}"
    known = f" It defines: {', '.join(there)}." if there else " It defines no function."
    near = suggest(call, there) if there else ""
    raise VelaturaError(f"reward 'function': {what} in {path}.{known}{near if 'Did you mean' in near else ''}")


def _is_own(value: object, module: ModuleType) -> bool:
    """Whether a callable was written in this file, not imported there."""
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _require_callable(function: Callable[..., Any], path: Path, options: FunctionOptions) -> None:
    """Say before the first picture that the function takes other arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return
    form = ("images", "prompts") if options.batch else ("image", "prompt")
    try:
        signature.bind(*form, **options.arguments)
    except TypeError as error:
        named = "".join(f", {name}=..." for name in options.arguments)
        raise VelaturaError(
            f"reward 'function': {options.call} in {path} is called as {options.call}({', '.join(form)}{named}), but "
            f"takes {signature}: {error}."
        ) from error
