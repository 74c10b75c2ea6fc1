"""`velatura schema`: what a recipe may say, for editors."""

from __future__ import annotations

import argparse
import json

from velatura.core.cli.arguments import Verbs, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura schema > recipe.schema.json"
    summary = "print the JSON Schema of recipes, with the options of everything installed, for editors"
    parser = new_parser(verbs, name, _schema, summary, example)
    parser.add_argument(
        "--file", action="append", default=[], metavar="FILE", help="also this plugin file, like ./my_reward.py"
    )
    parser.add_argument(
        "--without-options", action="store_true", help="leave out what is set on components; quick, imports nothing"
    )


def _schema(arguments: argparse.Namespace) -> int:
    from velatura.core.recipe import recipe_schema
    from velatura.core.registry import Registry
    from velatura.core.schema import with_components

    schema = recipe_schema()
    if not arguments.without_options:
        registry = Registry.discover()
        for file in arguments.file:
            registry.add_file(file)
        schema = with_components(schema, registry)
    print(json.dumps(schema, indent=2))
    return 0
