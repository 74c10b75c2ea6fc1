"""`velatura new-plugin NAME --kind KIND`: write a plugin package to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from velatura.core.cli.arguments import Verbs, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura new-plugin acme --kind reward --kind evaluator"
    parser = new_parser(verbs, name, _new_plugin, "write a plugin package that installs and passes its tests", example)
    parser.add_argument("name", metavar="NAME", help="of the plugin, as recipes will say it, like acme")
    parser.add_argument(
        "--kind", action="append", required=True, metavar="KIND", help="of component, like reward; may be repeated"
    )
    parser.add_argument("--into", type=Path, default=Path(), metavar="FOLDER", help="where; here by default")


def _new_plugin(arguments: argparse.Namespace) -> int:
    from velatura.core.scaffold import new_plugin

    folder = new_plugin(arguments.name, arguments.kind, arguments.into)
    print(f"wrote {folder}")
    print(f"next: cd {folder} && pip install --editable '.[test]' && python -m pytest")
    return 0
