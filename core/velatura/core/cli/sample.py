"""`velatura sample`: make pictures of prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from velatura.core.cli.arguments import Verbs, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = 'velatura sample runs/tinyworld "a red circle above a blue square" --seed 3 --out circle.png'
    parser = new_parser(verbs, name, _sample, "make a picture of a prompt with a trained model", example)
    parser.add_argument("model", type=Path, metavar="MODEL_OR_RUN", help="a run folder, or an exported model")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the noise to start from (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="the picture (default: sample.png)")


def _sample(arguments: argparse.Namespace) -> int:
    from velatura.core.sample_command import sample

    sample(arguments.model, arguments.prompts, seed=arguments.seed, out=arguments.out)
    return 0
