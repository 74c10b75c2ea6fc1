"""`velatura sample`: draw a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from velatura.core.cli.arguments import Verbs, add_run_folder, new_parser


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = 'velatura sample runs/tinyworld "a red circle above a blue square" --seed 3 --out circle.png'
    parser = new_parser(verbs, name, _sample, "draw a prompt with a model of a run", example)
    add_run_folder(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw, or how to edit the source picture")
    parser.add_argument("--stage", metavar="NAME", help="whose model; the last that was trained, by default")
    parser.add_argument(
        "--source", type=Path, action="append", default=[], metavar="PICTURE",
        help="a picture to edit; once more for each further one, where the model takes several",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the noise to start from (default: 0)")
    parser.add_argument("--count", type=int, default=4, help="how many pictures, side by side (default: 4)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="what the model was made for, by default")
    parser.add_argument(
        "--device", default="auto", help="where to draw: auto (the GPU where there is one), cpu, cuda or cuda:N (auto)"
    )
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="the picture (default: sample.png)")


def _sample(arguments: argparse.Namespace) -> int:
    from velatura.core.errors import VelaturaError

    if arguments.count < 1:
        raise VelaturaError(f"--count is at least 1 (got {arguments.count})")

    from velatura.core.commands import sample

    print(
        sample(
            arguments.run_folder,
            arguments.prompt,
            arguments.out,
            stage=arguments.stage,
            seed=arguments.seed,
            count=arguments.count,
            sources=arguments.source,
            device=arguments.device,
            guidance=arguments.guidance,
        )
    )
    return 0
