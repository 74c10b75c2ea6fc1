"""`velatura eval`: do the evaluation of a run again, perhaps for other models."""

from __future__ import annotations

import argparse

from velatura.core.cli.arguments import Verbs, add_run_folder, new_parser
from velatura.core.cli.console import say_through


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura eval runs/tinyworld --models base student"
    parser = new_parser(verbs, name, _evaluate, "evaluate the models of a run", example)
    add_run_folder(parser)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="stages, or 'base'; those of the recipe by default")


def _evaluate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from velatura.core.closing import close
    from velatura.core.commands import eval_run

    console = Console()
    say_through(console)
    close(eval_run(arguments.run_folder, arguments.models, console=console), console)
    return 0
