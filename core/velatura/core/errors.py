"""Messages a user can act on: what was asked, where, what there is, and the nearest match."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches


class VelaturaError(Exception):
    """Something the user can mend. The command line prints its message alone and exits with status 2."""


class RecipeError(VelaturaError):
    """The recipe asks for something that does not exist or does not fit."""


class PluginError(VelaturaError):
    """A plugin is missing, broken, or says something the core does not understand."""


class RewardError(VelaturaError):
    """Rewards failed more often than the budget allows, or broke their contract."""


class CheckpointError(VelaturaError):
    """A checkpoint is missing, truncated, or belongs to something else."""


class NotFiniteError(VelaturaError):
    """More updates were not finite than the budget allows."""


class Stopped(VelaturaError):
    """The run was asked to stop, has saved what it did, and goes on with the same command."""


class SelfCheckError(VelaturaError):
    """The loop found before its first update that training would be wrong."""


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the nearest known name, or a list of what there is.

    >>> suggest("hgih-noise", ["high-noise", "all"])
    " Did you mean 'high-noise'?"
    """
    names = sorted(set(known))
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    if near and not (kin := _relatives(name, names)):
        return f" Did you mean {near[0]!r}?"
    shown = kin if near else names
    return f" There is: {', '.join(shown)}." if shown else " There is none."


def _relatives(name: str, names: Sequence[str]) -> Sequence[str]:
    """Names that are near only by their first word: the rest is another, so any of them may be meant."""
    first, _, rest = name.partition("-")
    kin = [other for other in names if other.startswith(f"{first}-")]
    rests = [other.removeprefix(f"{first}-") for other in kin]
    return [] if len(kin) < 3 or get_close_matches(rest, rests, n=1, cutoff=0.6) else kin


def either(words: Sequence[str]) -> str:
    """`rl, distill or merge`."""
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def prefixed(at: str, message: str) -> str:
    """`message` with the place it is about in front, when there is one.

    >>> prefixed("rewards.1", "no such thing")
    'rewards.1: no such thing'
    """
    return f"{at}: {message}" if at else message


@contextmanager
def located(at: str) -> Iterator[None]:
    """Errors of components, which do not know where in the recipe they stand, become errors there."""
    try:
        yield
    except RecipeError:
        raise
    except VelaturaError as error:
        raise RecipeError(prefixed(at, str(error))) from error


def cause(error: BaseException) -> str:
    """An exception on one line, also where its own `repr` would be a tuple of source positions.

    >>> cause(KeyError("ocr"))
    'KeyError("\\'ocr\\'")'
    """
    return f"{type(error).__name__}({str(error)!r})"
