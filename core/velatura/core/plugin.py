"""One plugin: where it comes from, how it is imported, and what its hooks offer."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import FunctionType, ModuleType
from typing import Any

import pluggy

from velatura.core import __version__, hookspecs
from velatura.core.components import Component
from velatura.core.contracts import CONTRACTS
from velatura.core.deprecation import Renamed, mismatch
from velatura.core.errors import PluginError, cause, suggest

HOOK = "velatura_"
"""Every hook is called this and the kind it answers for."""
RETURNS = "it should return a list of classes or of strings 'name = package.module:Class'"
REFERENCE = re.compile(r"\s*(?P<name>[^\s=]+)\s*=\s*(?P<module>[\w.]+):(?P<attribute>\w+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a plugin comes from."""

    plugin: str
    """Its name: that of the entry point, or of the file without `.py`."""
    distribution: str = ""
    """The installed package, or the path of a plugin file."""
    version: str = ""
    requires: str = ""
    """Releases of velatura that the package says it is made for, like `>=0.1,<0.2`."""
    builtin: bool = False
    """Whether its components carry bare names."""
    is_file: bool = False
    """Whether a recipe names its file; then bare names that no built-in has find it too."""

    @property
    def package(self) -> str:
        """`velatura-acme 0.1`."""
        return f"{self.distribution} {self.version}".strip()

    def __str__(self) -> str:
        """`plugin 'acme' (from velatura-acme 0.1)`."""
        source = f" (from {self.package})" if self.package else ""
        return f"plugin {self.plugin!r}{source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A component that a plugin provides."""

    origin: Origin
    kind: str
    short: str
    """The name without the plugin's."""
    target: type[Component[Any]] | str
    """The class, or `package.module:Class`; nothing, where the name is an old one."""
    renamed: Renamed | None = None
    """What an old name stands for."""

    @property
    def name(self) -> str:
        """How a recipe names it."""
        return self.short if self.origin.builtin else f"{self.origin.plugin}/{self.short}"

    def resolve(self) -> type[Component[Any]]:
        """The class, imported if need be, after making sure that it is what the plugin says."""
        target = self._imported() if isinstance(self.target, str) else self.target
        contract = CONTRACTS[self.kind]
        said = f"{self.origin}: {self.kind} {self.short!r}"
        if not (isinstance(target, type) and issubclass(target, contract)):
            raise PluginError(f"{said} is {target!r}, which is not a subclass of {contract.__name__}")
        if getattr(target, "name", None) != self.short:
            actual = getattr(target, "name", None)
            raise PluginError(f"{said} is a class whose name is {actual!r}; set name = {self.short!r} in it")
        if inspect.isabstract(target):
            missing = sorted(target.__abstractmethods__)
            raise PluginError(f"{said} lacks {', '.join(missing)}. Write {_signatures(contract, missing)}.")
        return target

    def _imported(self) -> Any:
        """What the string refers to."""
        module, _, attribute = str(self.target).partition(":")
        said = f"{self.origin}: {self.kind} {self.short!r}"
        try:
            imported = importlib.import_module(module)
        except Exception as error:
            raise PluginError(f"{said} does not import: {cause(error)}") from error
        if not hasattr(imported, attribute):
            raise PluginError(f"{said} is said to be {self.target}, but {module} has no {attribute!r}")
        return getattr(imported, attribute)


def _signatures(contract: type[Component[Any]], methods: Iterable[str]) -> str:
    """`score(self, samples)` of every method."""
    return ", ".join(f"{m}({', '.join(inspect.signature(getattr(contract, m)).parameters)})" for m in methods)


def import_file(path: Path) -> ModuleType:
    """A Python file as a module of its own, importable again by pickles in this process."""
    name = f"velatura_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load(manager: pluggy.PluginManager, origin: Origin, importer: Callable[[], object]) -> object:
    """Import a plugin and register its hooks; whatever goes wrong becomes a `PluginError` that names the plugin."""
    if wrong := mismatch(origin.requires):
        raise PluginError(f"{origin} {wrong}, or install a release of it that is made for this one.")
    try:
        plugin = importer()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{origin} does not import{_line(origin, error)}: {_raised(error)}") from error
    for name in dir(plugin):
        is_hook = name.startswith(HOOK) and isinstance(getattr(plugin, name), FunctionType)
        if is_hook and manager.parse_hookimpl_opts(plugin, name) is None:
            raise PluginError(f"{origin} defines {name!r} without @hookimpl; put it above the function")
    try:
        manager.register(plugin, f"{origin.plugin} {origin.package} {origin.builtin}")
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"{origin} does not fit this velatura: {cause(error)}") from error
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            manager.unregister(plugin)
            known = [f"{HOOK}{kind}" for kind in CONTRACTS]
            raise PluginError(
                f"{origin} implements {caller.name!r}, which this velatura does not have.{suggest(caller.name, known)}"
            )
    return plugin


def _line(origin: Origin, error: BaseException) -> str:
    """`, line 3` of a plugin file, where its import ended."""
    trace = error.__traceback__
    lines = [number for frame, number in walk_tb(trace) if frame.f_code.co_filename == origin.distribution]
    return f", line {lines[-1]}" if lines else ""


def _raised(error: BaseException) -> str:
    """What a plugin raised while it was imported, and what to do about a package that is not there."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{cause(error)}. Install what has it, or mend the import."
    return _other_release(error) or cause(error)


def _other_release(error: BaseException) -> str:
    """What to say of a name that `velatura.api` does not have."""
    if not isinstance(error, ImportError) or error.name != "velatura.api":
        return ""
    from velatura import api

    missing = re.search(r"cannot import name '(\w+)'", str(error))
    if missing is None:
        return ""
    near = suggest(missing[1], api.__all__)
    return (
        f"velatura.api has no {missing[1]!r}.{near if near.startswith(' Did') else ''} This is velatura {__version__}; "
        f"was the plugin made for another release?"
    )


def offers(manager: pluggy.PluginManager, origin: Origin, plugin: object, kind: str) -> list[Offer]:
    """What a loaded plugin provides of one kind."""
    hook = f"{HOOK}{kind}"
    implementations = [i for i in getattr(manager.hook, hook).get_hookimpls() if i.plugin is plugin]
    found: list[Offer] = []
    for implementation in implementations:
        try:
            answer = implementation.function()
        except Exception as error:
            raise PluginError(f"{origin}: {hook} raised {cause(error)}") from error
        if isinstance(answer, str | bytes) or not isinstance(answer, Iterable):
            raise PluginError(f"{origin}: {hook} returned {answer!r}; {RETURNS}")
        found += [_offer(origin, kind, item) for item in answer]
    return found


def _offer(origin: Origin, kind: str, item: object) -> Offer:
    """One item of a hook's answer."""
    hook = f"{HOOK}{kind}"
    if isinstance(item, Renamed):
        return Offer(origin=origin, kind=kind, short=item.old, target="", renamed=item)
    if isinstance(item, str):
        match = REFERENCE.fullmatch(item)
        if match is None:
            raise PluginError(f"{origin}: {hook} names {item!r}; write 'name = package.module:Class'")
        return Offer(origin=origin, kind=kind, short=match["name"], target=f"{match['module']}:{match['attribute']}")
    if not isinstance(item, type) or not issubclass(item, Component):
        raise PluginError(f"{origin}: {hook} returned {item!r}, which is not a component class; {RETURNS}")
    short = getattr(item, "name", None)
    if not isinstance(short, str):
        raise PluginError(f"{origin}: {hook} returned class {item.__name__}, which has no name; set name = '...' in it")
    return Offer(origin=origin, kind=kind, short=short, target=item)


def new_manager() -> pluggy.PluginManager:
    """A plugin manager that knows this project's hooks."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager
