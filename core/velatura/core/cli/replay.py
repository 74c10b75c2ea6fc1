"""`velatura replay`: an update that was not finite, once more."""

from __future__ import annotations

import argparse
from pathlib import Path

from velatura.core.cli.arguments import Verbs, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura replay runs/tinyworld/teacher_t2i/nonfinite/step-000012-update-0"
    summary = "compute an update that was skipped again, and say what in it is not finite"
    parser = new_parser(verbs, name, _replay, summary, example)
    parser.add_argument("kept", type=Path, metavar="KEPT", help="a folder below RUN/STAGE/nonfinite/")


def _replay(arguments: argparse.Namespace) -> int:
    from velatura.core.replay import replay, told

    found = replay(arguments.kept)
    print(told(found))
    return 0 if found.finite else 1
