"""`velatura check`: find out what is wrong with a recipe, and what it would do, without running it."""

from __future__ import annotations

import argparse

from velatura.core.cli.arguments import Verbs, add_recipe, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura check recipes/tinyworld.yaml stages.student.steps=200"
    parser = new_parser(verbs, name, _check, "look for mistakes in a recipe and print its plan; runs nothing", example)
    add_recipe(parser)
    parser.add_argument(
        "--world-size", type=_count, default=1, metavar="N", help="GPUs that the memory is estimated for (default: 1)"
    )


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is no number of GPUs. Give 1 or more.")
    return int(given)


def _check(arguments: argparse.Namespace) -> int:
    from velatura.core.recipe import load_recipe

    load_recipe(arguments.recipe, arguments.overrides)  # its mistakes are told before torch is imported

    from velatura.core.check import check
    from velatura.core.cli.arguments import new_console
    from velatura.core.pipeline import plan_run

    check(plan_run(arguments.recipe, arguments.overrides), new_console(), arguments.world_size)
    return 0
