"""The frame of every component: frozen options, a kind, a name, a `setup`. Imports no torch."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, get_args, get_origin

from velatura.core.options import NoOptions as NoOptions
from velatura.core.options import Options as Options

if TYPE_CHECKING:
    from velatura.core.types import Context


O = TypeVar("O", bound=Options)  # noqa: E741


class Component(ABC, Generic[O]):
    """The frame of every contract: a kind, a name, typed options, and a `setup` before first use."""

    kind: ClassVar[str]
    """Set by the contract."""
    name: ClassVar[str]
    """How a recipe names it: lower case, words joined by '-'."""
    options_class: ClassVar[type[Options]] = NoOptions
    """Read off the type parameter."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in getattr(cls, "__orig_bases__", ()):
            origin = get_origin(base)
            if isinstance(origin, type) and issubclass(origin, Component):
                for argument in get_args(base):
                    if isinstance(argument, type) and issubclass(argument, Options):
                        cls.options_class = argument

    def __init__(self, options: O | None = None) -> None:
        self.options: O = options if options is not None else self.options_class()  # type: ignore[assignment]

    def setup(self, context: Context) -> None:
        """Load weights, open clients: once per process, before first use. Making a component costs nothing."""

    @classmethod
    def example(cls) -> Self:
        """One that can be tried anywhere, for `velatura.testing`: small, on a CPU, without downloads. Write your own
        where the default options need weights, a file or a server."""
        return cls()
