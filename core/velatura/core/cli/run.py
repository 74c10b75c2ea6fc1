"""`velatura run`: do what is missing of a recipe."""

from __future__ import annotations

import argparse

from velatura.core.cli.arguments import Verbs, add_recipe, new_parser
from velatura.core.cli.console import say_through


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura run recipes/tinyworld.yaml stages.teacher_t2i.steps=40 seed=1"
    summary = "run the stages of a recipe, skipping those that are done and unchanged"
    parser = new_parser(verbs, name, _run, summary, example)
    add_recipe(parser)
    parser.add_argument("--stage", metavar="NAME", help="only this stage; what it builds on must be done")
    parser.add_argument("--fresh", action="store_true", help="do every stage again, whatever is there")


def _run(arguments: argparse.Namespace) -> int:
    from velatura.core.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)  # its mistakes are told before torch is imported
    if arguments.stage is not None:
        recipe.stage(arguments.stage)

    from rich.console import Console

    from velatura.core.closing import close
    from velatura.core.pipeline import run_pipeline

    console = Console()
    say_through(console)
    options = {"only": arguments.stage, "fresh": arguments.fresh, "console": console}
    folder = run_pipeline(arguments.recipe, arguments.overrides, **options)
    close(folder, console)
    return 0
