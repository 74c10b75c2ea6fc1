"""What the verbs' parsers have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from velatura.core.shipped import find_recipe

if TYPE_CHECKING:
    from rich.console import Console

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a parser adds its verbs."""
Verb = Callable[[argparse.Namespace], int]


def new_parser(verbs: Verbs, name: str, verb: Verb, summary: str, example: str) -> argparse.ArgumentParser:
    """A parser for one verb, with an example at the end of its help."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(verb=verb)
    return parser


def new_console() -> Console:
    """A terminal, or a page wide enough that names are not cut when the output goes to a file."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=180)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """`RECIPE [path=value ...]`."""
    parser.add_argument(
        "recipe", type=_recipe, metavar="RECIPE", help="the recipe: a YAML file, or the name of one that ships"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="path=value",
        help="values in place of the recipe's, like stages.teacher_t2i.objective.with.beta=0.5",
    )


def _recipe(given: str) -> Path:
    return find_recipe(Path(given))


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """`RUN_FOLDER`."""
    parser.add_argument(
        "run_folder", type=Path, metavar="RUN_FOLDER", help="what 'velatura run' made, like runs/tinyworld"
    )
