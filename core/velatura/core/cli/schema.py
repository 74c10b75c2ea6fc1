"""`velatura schema`: what a recipe may say, for editors."""

from __future__ import annotations

import argparse
import json

from velatura.core.cli.arguments import Verbs, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura schema > recipe.schema.json"
    new_parser(verbs, name, _schema, "print the JSON Schema of recipes", example)


def _schema(arguments: argparse.Namespace) -> int:
    from velatura.core.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
    return 0
