"""From (kind, name) to a class: which plugins there are, and what they offer. Imports only what is asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Self

from velatura.core.components import Component
from velatura.core.contracts import CONTRACTS
from velatura.core.deprecation import deprecated, has_ended
from velatura.core.describe import summary_of
from velatura.core.errors import PluginError, RecipeError, prefixed, suggest
from velatura.core.other_names import called_otherwise
from velatura.core.plugin import HOOK, Offer, Origin, import_file, load, new_manager, offers

DISTRIBUTION = "velatura"
"""Entry points of this distribution are built-ins."""
GROUP = "velatura"
"""The entry point group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentInfo:
    """One line of `velatura plugins list`."""

    kind: str
    name: str
    """How a recipe names it."""
    plugin: str
    distribution: str
    """The installed package, or the plugin file."""
    version: str
    summary: str
    """First line of the class's docstring."""
    problem: str = ""
    """Why it cannot be used; empty when all is well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenPlugin:
    """A plugin that cannot be used."""

    name: str
    distribution: str
    version: str
    error: PluginError
    """What to tell the user; its `__cause__` is what the plugin raised."""


class Registry:
    """All plugins and their components. Nothing is imported before somebody asks for it by name."""

    def __init__(self) -> None:
        """No plugins yet; see `discover` and `empty`."""
        self._manager = new_manager()
        self._importers: dict[Origin, Callable[[], object]] = {}
        self._modules: dict[Origin, str] = {}
        self._plugins: dict[Origin, object] = {}
        self._errors: dict[Origin, PluginError] = {}
        self._offers: dict[tuple[Origin, str], list[Offer]] = {}

    @classmethod
    def discover(cls) -> Self:
        """Everything that is installed."""
        registry = cls()
        for entry in entry_points(group=GROUP):
            name = entry.dist.name if entry.dist else ""
            version = entry.dist.version if entry.dist else ""
            builtin = name == DISTRIBUTION
            requires = "" if builtin or entry.dist is None else _requirement(entry.dist.requires or ())
            origin = Origin(plugin=entry.name, distribution=name, version=version, requires=requires, builtin=builtin)
            registry._importers[origin] = partial(EntryPoint.load, entry)
            registry._modules[origin] = entry.module
        registry._refuse_namesakes()
        return registry

    @classmethod
    def empty(cls) -> Self:
        """No plugins at all, whatever is installed: for tests."""
        return cls()

    def add(self, plugin: object, name: str, *, builtin: bool = False) -> None:
        """Use an object with hooks (a module, usually) as a plugin."""
        self._include(Origin(plugin=name, builtin=builtin), lambda: plugin)

    def add_file(self, path: str | Path) -> None:
        """Use a Python file as a plugin named after it. A second time for the same file does nothing."""
        path = Path(path).resolve()
        if not path.is_file():
            beside = [file.name for file in path.parent.glob("*.py")]
            raise PluginError(f"there is no plugin file {str(path)!r}.{suggest(path.name, beside) if beside else ''}")
        self._include(Origin(plugin=path.stem, distribution=str(path), is_file=True), partial(import_file, path))

    def _include(self, origin: Origin, importer: Callable[[], object]) -> None:
        if origin not in self._importers:
            self._importers[origin] = importer
            self._refuse_namesakes()

    def _refuse_namesakes(self) -> None:
        """Plugins of one name cannot be told apart by a recipe: none of them can be used."""
        counts = Counter(origin.plugin for origin in self._importers if not origin.builtin)
        for origin in self._importers:
            if not origin.builtin and counts[origin.plugin] > 1:
                owners = [o.package for o in self._importers if o.plugin == origin.plugin and not o.builtin]
                names = " and from ".join(sorted(owners))
                advice = "rename one of the files, or uninstall one of the packages"
                self._errors[origin] = PluginError(f"two plugins are called {origin.plugin!r}: from {names}; {advice}")

    def get(self, kind: str, name: str, at: str = "") -> type[Component[Any]]:
        """The class that a recipe means by `name`; `at` is the place in the recipe, for messages."""
        offer = self._find(kind, name, at)
        try:
            return offer.resolve()
        except PluginError as error:
            raise PluginError(prefixed(at, str(error))) from error.__cause__

    def info(self, kind: str, name: str, at: str = "") -> ComponentInfo:
        """Where a component comes from, and what it is in a line."""
        return _describe(self._find(kind, name, at))

    def list(self) -> Sequence[ComponentInfo]:
        """Every component of every plugin that works. Imports all plugins, but not what they name by string."""
        found: list[ComponentInfo] = []
        for kind in CONTRACTS:
            for origin in self._importers:
                try:
                    found += [_describe(offer) for offer in self._provided(origin, kind) if not offer.renamed]
                except PluginError as error:
                    self._errors.setdefault(origin, error)
        return sorted(found, key=lambda info: (list(CONTRACTS).index(info.kind), "/" in info.name, info.name))

    def components_of(self, plugin: str) -> Sequence[ComponentInfo]:
        """Everything that one plugin offers.

        Raises:
            PluginError: there is no such plugin, it is broken, or it offers nothing.
        """
        origin = self._origin(plugin)
        found = [_describe(o) for kind in CONTRACTS for o in self._provided(origin, kind) if not o.renamed]
        if not found:
            raise PluginError(f"{origin} offers no components; return them from a hook, like {HOOK}reward")
        return found

    def module_of(self, plugin: str) -> str | None:
        """The module of an installed plugin; None for a file, or an object that was added."""
        return self._modules.get(self._origin(plugin))

    def _origin(self, plugin: str) -> Origin:
        """Where a plugin comes from; a built-in one gives way to one from outside of the same name."""
        named = [origin for origin in self._importers if origin.plugin == plugin]
        if not named:
            known = {origin.plugin for origin in self._importers}
            raise PluginError(f"no plugin {plugin!r} is installed.{suggest(plugin, known)}")
        return min(named, key=lambda origin: origin.builtin)

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """Plugins that were asked for and cannot be used; all of them after `list`."""
        return tuple(
            BrokenPlugin(name=o.plugin, distribution=o.distribution, version=o.version, error=error)
            for o, error in self._errors.items()
        )

    def _find(self, kind: str, name: str, at: str) -> Offer:
        """What provides this component."""
        if kind not in CONTRACTS:
            raise PluginError(f"there is no kind of component called {kind!r}.{suggest(kind, CONTRACTS)}")
        namespace, slash, short = name.partition("/")
        if slash:
            origins = [origin for origin in self._importers if origin.plugin == namespace and not origin.builtin]
            if not origins:
                installed = {origin.plugin for origin in self._importers if not origin.builtin}
                hint = suggest(namespace, installed) if installed else ""
                if "Did you mean" not in hint:
                    hint += " Install the package that has it, or name its file under 'plugins' of the recipe."
                raise RecipeError(prefixed(at, f"no plugin {namespace!r} is installed.{hint}"))
            return self._only(kind, name, short, origins, at)
        builtins = [origin for origin in self._importers if origin.builtin]
        files = [origin for origin in self._importers if origin.is_file]
        taken = any(offer.short == name for offer in self._of(builtins, kind)[0])
        return self._only(kind, name, name, builtins if taken else [*builtins, *files], at)

    def _only(self, kind: str, name: str, short: str, origins: Iterable[Origin], at: str) -> Offer:
        """The one component of this name in these plugins."""
        there, errors = self._of(origins, kind)
        matches = [offer for offer in there if offer.short == short]
        if not matches and errors:
            raise PluginError(prefixed(at, str(errors[0]))) from errors[0].__cause__
        if not matches:
            known = {offer.name for offer in there if not offer.renamed}
            other = self._of_another_kind(kind, short, origins)
            hint = called_otherwise(kind, name) or f"{other}{suggest(name, known)}"
            raise RecipeError(prefixed(at, f"no {kind} is called {name!r}.{hint}"))
        if len(matches) > 1:
            owners = " and ".join(str(offer.origin) for offer in matches)
            raise PluginError(prefixed(at, f"two components of kind {kind} are called {name!r}: one of {owners}"))
        return self._by_new_name(matches[0], there, at) if matches[0].renamed else matches[0]

    def _by_new_name(self, old: Offer, there: Sequence[Offer], at: str) -> Offer:
        """What an old name stands for, with a warning, until the release in which it ends."""
        assert old.renamed is not None
        new = [o for o in there if o.origin == old.origin and o.short == old.renamed.new and not o.renamed]
        if not new:
            raise PluginError(
                f"{old.origin}: {old.kind} {old.short!r} is said to be called {old.renamed.new!r} now, which the "
                f"plugin does not offer"
            )
        release = f"{old.origin.distribution or old.origin.plugin} {old.renamed.until}"
        if has_ended(old.renamed.until, old.origin.version):
            said = f"{old.kind} {old.name!r} is called {new[0].name!r} since {release}. Write {new[0].name!r}."
            raise RecipeError(prefixed(at, said))
        said = f"{old.kind} {old.name!r} is called {new[0].name!r} now; the old name ends with {release}."
        deprecated(prefixed(at, f"{said} Write {new[0].name!r}."))
        return new[0]

    def _of_another_kind(self, kind: str, short: str, origins: Iterable[Origin]) -> str:
        """What to say where the name is that of a component of another kind."""
        kinds = [other for other in CONTRACTS if other != kind]
        found = [other for other in kinds if any(o.short == short for o in self._of(origins, other)[0])]
        return f" There is one of kind {' and '.join(found)}." if found else ""

    def _of(self, origins: Iterable[Origin], kind: str) -> tuple[Sequence[Offer], Sequence[PluginError]]:
        """What these plugins offer of one kind, and why some of them offer nothing."""
        there: list[Offer] = []
        errors: list[PluginError] = []
        for origin in origins:
            try:
                there += self._provided(origin, kind)
            except PluginError as error:
                errors.append(error)
        return there, errors

    def _provided(self, origin: Origin, kind: str) -> Sequence[Offer]:
        """What a plugin offers of one kind; the plugin is imported on the first question."""
        if origin in self._errors:
            raise self._errors[origin]
        if (origin, kind) not in self._offers:
            try:
                if origin not in self._plugins:
                    self._plugins[origin] = load(self._manager, origin, self._importers[origin])
                self._offers[origin, kind] = offers(self._manager, origin, self._plugins[origin], kind)
            except PluginError as error:
                self._errors[origin] = error
                raise
        return self._offers[origin, kind]


def _requirement(lines: Iterable[str]) -> str:
    """`>=0.1,<0.2` of what a package says that it needs of velatura, without extras."""
    for line in lines:
        needed, _, marker = line.partition(";")
        match = re.fullmatch(r"velatura\s*(?:\[[^]]*\])?\s*\(?([^()]*)\)?", needed.strip())
        if "extra" in marker:
            continue
        if match:
            return match[1].strip()
    return ""


def _describe(offer: Offer) -> ComponentInfo:
    """One component in a line."""
    summary, problem = summary_of(offer.target)
    origin = offer.origin
    return ComponentInfo(
        kind=offer.kind,
        name=offer.name,
        plugin=origin.plugin,
        distribution=origin.distribution,
        version=origin.version,
        summary=summary,
        problem=problem,
    )
