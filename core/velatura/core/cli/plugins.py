"""`velatura plugins list`, `show` and `check`: what there is, what can be set on it, whether it keeps its contract."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from velatura.core.cli.arguments import Verbs, new_console, new_parser

if TYPE_CHECKING:
    from velatura.core.registry import Registry


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    parser = verbs.add_parser(name, help="list installed components, show one, or check a plugin", allow_abbrev=False)
    actions = parser.add_subparsers(metavar="list|show|check", required=True)
    example = "velatura plugins list --kind reward"
    listing = new_parser(actions, "list", _list, "list every installed component", example)
    listing.add_argument("--kind", help="only of this kind, like reward")
    example = "velatura plugins show high-noise"
    showing = new_parser(actions, "show", _show, "describe one component and its options", example)
    showing.add_argument("name", metavar="NAME", help="as in a recipe, like nft or acme/redness")
    showing.add_argument("--kind", help="where several kinds have a component of this name")
    example = "velatura plugins check schedulers"
    checking = new_parser(actions, "check", _check, "try every component of a plugin against its contract", example)
    checking.add_argument("name", metavar="PLUGIN", help="as in the column 'plugin' of the list, like acme")
    checking.add_argument("--kind", help="only components of this kind, like reward")
    for action in (listing, showing, checking):
        action.add_argument(
            "--file", action="append", default=[], metavar="FILE", help="also this plugin file, like ./my_reward.py"
        )


def _registry(arguments: argparse.Namespace) -> Registry:
    """What is installed, and the files named."""
    from velatura.core.contracts import CONTRACTS
    from velatura.core.errors import VelaturaError, suggest
    from velatura.core.registry import Registry

    if arguments.kind is not None and arguments.kind not in CONTRACTS:
        raise VelaturaError(f"no kind is called {arguments.kind!r}.{suggest(arguments.kind, CONTRACTS)}")
    registry = Registry.discover()
    for file in arguments.file:
        registry.add_file(file)
    return registry


def _list(arguments: argparse.Namespace) -> int:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    registry = _registry(arguments)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("kind", "name", "plugin", "package", "version", "what it is", "status"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("kind", "name", "plugin", "version"))
    for info in registry.list():
        if arguments.kind in (None, info.kind):
            cells = (info.kind, info.name, info.plugin, info.distribution, info.version, info.summary)
            table.add_row(*map(Text, cells), Text(info.problem or "ok"))
    for broken in registry.broken:
        table.add_row("", "", Text(broken.name), Text(broken.distribution), broken.version, "", "broken, see below")
    console = new_console()
    console.print(table)
    for broken in registry.broken:
        console.print(Text(f"broken: {broken.error}"), soft_wrap=True)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from velatura.core.cli.show import show
    from velatura.core.contracts import CONTRACTS
    from velatura.core.errors import VelaturaError, suggest

    registry = _registry(arguments)
    kinds = [arguments.kind] if arguments.kind else list(CONTRACTS)
    infos = [info for info in registry.list() if info.kind in kinds]
    found = [info for info in infos if info.name == arguments.name]
    if not found:
        for broken in registry.broken:
            if arguments.name.startswith(f"{broken.name}/"):
                raise broken.error
        what = arguments.kind or "component"
        known = {info.name for info in infos}
        raise VelaturaError(f"no {what} is called {arguments.name!r}.{suggest(arguments.name, known)}")
    console = new_console()
    for info in found:
        show(info, registry.get(info.kind, info.name), console)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """1 when something fails; what could not be tried is said, and is no failure."""
    from velatura.core.cli.conformance import print_outcomes
    from velatura.testing import outcome_of, plugin_checks

    checks = plugin_checks(arguments.name, registry=_registry(arguments))
    outcomes = [outcome_of(check) for check in checks if arguments.kind in (None, check.kind)]
    if not outcomes:
        from velatura.core.errors import VelaturaError

        raise VelaturaError(f"plugin {arguments.name!r} has no component of kind {arguments.kind!r}")
    return print_outcomes(outcomes, new_console())
