"""`velatura export`: write a model of a run so that stock libraries load it."""

from __future__ import annotations

import argparse
from pathlib import Path

from velatura.core.cli.arguments import Verbs, add_run_folder, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura export runs/tinyworld --stage student --to exported/student"
    parser = new_parser(verbs, name, _export, "write a trained model as a folder that diffusers loads", example)
    add_run_folder(parser)
    parser.add_argument("--stage", metavar="NAME", help="whose model; the last that was trained, by default")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where to write it")


def _export(arguments: argparse.Namespace) -> int:
    from velatura.core.commands import export_run

    print(export_run(arguments.run_folder, arguments.to, arguments.stage))
    return 0
