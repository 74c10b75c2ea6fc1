"""What went out of use: it works until a named release, with a warning that says what to write instead.

A plugin returns `Renamed` from a hook beside its components, or lists it in `renamed` of an options class. Imports no
torch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from velatura.core import __version__


class VelaturaDeprecation(FutureWarning):
    """Something works for a few releases more. Shown to users, not only to developers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """A component or an option has another name now; the old one works until a release of its package."""

    old: str
    """What recipes say until now; of a component the name without the plugin's."""
    new: str
    """What to write."""
    until: str
    """The first release of the package that does not know the old name any more, like `0.3`."""


def deprecated(message: str) -> None:
    """Warn of something that ends; the message says with which release, and what to do instead."""
    warnings.warn(message, VelaturaDeprecation, stacklevel=2)


def release(version: str) -> tuple[int, ...]:
    """(0, 3, 1) of `0.3.1rc2`: what is needed to compare releases; nothing of what is no version."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def has_ended(until: str, version: str) -> bool:
    """Whether release `until` is out, of a package whose version is `version`; not known without a version."""
    return bool(version) and release(version) >= release(until)


def with_new_names(given: Any, renamed: Sequence[Renamed], owner: str) -> Any:
    """Options as data, old names exchanged for new ones, with a warning for each.

    Raises:
        ValueError: the old name and the new one are both given.
    """
    if not isinstance(given, Mapping):
        return given
    found = dict(given)
    for change in renamed:
        if change.old not in found:
            continue
        if change.new in found:
            raise ValueError(f"{change.old!r} is the old name of {change.new!r}, and both are given. Leave it out")
        found[change.new] = found.pop(change.old)
        deprecated(
            f"{owner}: option {change.old!r} is called {change.new!r} now; the old name ends with release "
            f"{change.until}. Write {change.new!r}."
        )
    return found


def tell_plainly() -> None:
    """On the command line such a warning is a line of its own, like an error, once for each message."""
    warnings.filterwarnings("default", category=VelaturaDeprecation)
    before = warnings.showwarning
    if getattr(before, "plain", False):
        return

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, VelaturaDeprecation):
            print(f"velatura: deprecated: {message}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    show.plain = True  # type: ignore[attr-defined]
    warnings.showwarning = show


def mismatch(requirement: str) -> str:
    """Why a plugin that needs these releases of velatura does not fit this one; empty when it does.

    `requirement` is what stands behind the name in the package's dependencies, like `>=0.1,<0.2`.
    """
    if not requirement:
        return ""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        wanted = SpecifierSet(requirement)
    except InvalidSpecifier:
        return f"asks for velatura {requirement!r}, which is no range of versions"
    if wanted.contains(__version__, prereleases=True):
        return ""
    above = [part.version for part in wanted if part.operator in (">=", ">", "==", "~=", "===")]
    newer = any(release(version.rstrip(".*")) > release(__version__) for version in above)
    age = "newer" if newer else "older"
    remedy = "Upgrade velatura" if newer else "Upgrade the plugin"
    return f"is made for velatura {requirement}, which is {age} than this velatura {__version__}. {remedy}"
