"""`velatura report`: write a run's report.html again."""

from __future__ import annotations

import argparse

from velatura.core.cli.arguments import Verbs, add_run_folder, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    parser = new_parser(verbs, name, _report, "write report.html of a run", "velatura report runs/tinyworld")
    add_run_folder(parser)


def _report(arguments: argparse.Namespace) -> int:
    from velatura.core.report import build_report

    print(build_report(arguments.run_folder))
    return 0
