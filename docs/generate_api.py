"""Write docs/contracts.md and docs/cli.md from the code: python docs/generate_api.py [--check]."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from velatura.core.cli.program import _parser
from velatura.core.components import Component
from velatura.core.contracts import CONTRACTS

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/generate_api.py from the code; change the docstrings there, then run it again. -->"
MARKS = {
    ("run",): "runnable, in short", ("rewards", "bench"): "runnable, with --calls 1",
    ("check",): "parsed: tutorial.md runs one",
    ("serve-reward",): "runnable, served, with --port 0", ("ablate",): "parsed: hours",
    ("replay",): "parsed: it needs an update that was not finite; unit_tests/loop has some",
    ("reward-card",): "parsed: it needs a judge and its rated pictures",
}  # fmt: skip
"""How the example of a command is tested, where it is not run as it stands (unit_tests/docs/pages.py)."""
SAME = {("rewards", "card"): "[`velatura reward-card`](#velatura-reward-card)"}
"""Commands with two names."""
CONTRACTS_HEAD = f"""\
# Hooks and contracts

{NOTE}

A plugin is a module with hooks. A hook takes no argument and returns what the plugin provides of one kind: classes,
strings `"name = package.module:Class"` that are imported when a recipe names them, and `Renamed(...)` for names that go
out of use. A class implements the contract of its kind. Everything here is imported from `velatura.api`.

How to begin: [plugins](plugins.md). Which components there are: [recipes](recipes.md#components).
"""
CLI_HEAD = f"""\
# The command line

{NOTE}

`velatura COMMAND --help` says the same. A command ends with 0 when it is done, with 1 when what was measured does not
pass, with 2 when you can mend what is wrong (one message says how), with 75 when it was asked to stop and has saved,
and with 130 after a second Ctrl-C ([stopping](stopping.md#ways-to-end)).
"""


def contracts_page() -> str:
    """Every hook and every contract."""
    parts = [CONTRACTS_HEAD, *contract("All components", Component, "")]
    for kind, cls in CONTRACTS.items():
        parts += contract(kind, cls, f"velatura_{kind}")
    return "\n".join(parts)


def contract(title: str, cls: type[Component[Any]], hook: str) -> Iterator[str]:
    """One contract: its hook, its sentence, its attributes and methods."""
    yield f"## {title}\n"
    said = f", offered by the hook `{hook}`." if hook else "."
    yield f"**`{cls.__name__}`**{said}"
    yield f"\n{inspect.cleandoc(cls.__doc__ or '')}\n"
    if found := attributes(cls):
        yield "| attribute | what it says |\n|---|---|"
        yield from (f"| `{name}` | {about} |" for name, about in found)
        yield ""
    for name, function in own(cls):
        mark = ", to be written" if getattr(function, "__isabstractmethod__", False) else ""
        yield f"### `{cls.__name__}.{name}`{mark}\n"
        yield f"```text\n{name}{signature(function)}\n```\n"
        yield f"{inspect.cleandoc(function.__doc__ or '')}\n"


def attributes(cls: type[Component[Any]]) -> list[tuple[str, str]]:
    """Public class attributes with the text below them, which only the source has."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = []
    for one, after in pairwise(tree.body):
        target = one.target if isinstance(one, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found.append((target.id, " ".join(str(after.value.value).split()).replace("|", "\\|")))
    return [(name, text) for name, text in found if not name.startswith("_")]


def signature(function: Any) -> str:
    """Of a method, as a person writes it; of a property, its type."""
    if isinstance(function, property):
        return f": {inspect.signature(function.fget).return_annotation}" if function.fget else ""
    return str(inspect.signature(getattr(function, "__func__", function))).replace("'", "")


def own(cls: type[Component[Any]]) -> Iterator[tuple[str, Any]]:
    """Public methods that the contract itself defines, those to be written first."""
    found = [
        (name, value)
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (isinstance(value, property) or inspect.isroutine(getattr(value, "__func__", value)))
    ]
    yield from sorted(found, key=lambda item: not getattr(item[1], "__isabstractmethod__", False))


def cli_page() -> str:
    """Every command."""
    return "\n".join([CLI_HEAD, *commands(_parser(), ("velatura",))])


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[str]:
    """A command and those below it."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if len(path) > 1 and not inner:
        yield from command(parser, path)
    for action in inner:
        for name, below in action.choices.items():
            yield from commands(below, (*path, name))


def command(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[str]:
    """One command: its sentence, its arguments, an example."""
    yield f"## `{' '.join(path)}`\n\n{parser.description or ''}\n"
    if path[1:] in SAME:
        yield f"The same as {SAME[path[1:]]}.\n"
        return
    rows = [row(action) for action in parser._actions if action.dest not in ("help",) and action.help]
    if rows:
        yield "| argument | what it is |\n|---|---|"
        yield from rows
        yield ""
    if parser.epilog:
        example = inspect.cleandoc(parser.epilog.removeprefix("example:\n"))
        yield f"<!-- {MARKS.get(path[1:], 'runnable')} -->\n```sh\n{example}\n```\n"


def row(action: argparse.Action) -> str:
    """One argument."""
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    value = f" {action.metavar or action.dest.upper()}" if action.option_strings and action.nargs != 0 else ""
    cells = (f"`{name}{value}`", (action.help or "").replace("%%", "%"))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PAGES = {"contracts.md": contracts_page, "cli.md": cli_page}


def main() -> int:
    """Write the pages, or say whether they are current."""
    if "--check" in sys.argv[1:]:
        return int(any((DOCS / name).read_text(encoding="utf-8") != page() for name, page in PAGES.items()))
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
