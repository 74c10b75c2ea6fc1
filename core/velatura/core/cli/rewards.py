"""`velatura rewards bench`: how fast the rewards of a recipe are, and what they cost a training step."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from velatura.core.cli import reward_card
from velatura.core.cli.arguments import Verbs, add_recipe, new_console, new_parser

if TYPE_CHECKING:
    from rich.console import Console

    from velatura.core.bench import Bench, Measured


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura rewards bench recipes/tinyworld.yaml --calls 20"
    parser = new_parser(verbs, name, _bench, "measure rewards: their speed, or their agreement with people", example)
    actions = parser.add_subparsers(metavar="bench|card", required=True)
    summary = "time the rewards of a recipe on pictures of its task, and say what they cost a training step"
    bench = new_parser(actions, "bench", _bench, summary, example)
    add_recipe(bench)
    bench.add_argument(
        "--calls",
        type=_count,
        default=20,
        metavar="N",
        help="calls to time, after one that does not count (default: 20)",
    )
    bench.add_argument("--batch", type=_count, metavar="N", help="pictures in a call; as in a run by default")
    bench.add_argument("--stage", metavar="NAME", help="only the rewards of this stage")
    bench.add_argument("--device", help="where models live: auto, cpu, cuda or cuda:N; the recipe's by default")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file, too")
    prices = {"prompt": "read", "completion": "written"}
    for kind, what in prices.items():
        bench.add_argument(f"--{kind}-price", type=_price, metavar="X", help=f"price of a million tokens {what}")
    reward_card.add("card", actions)


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is no number from 1")
    return int(given)


def _price(given: str) -> float:
    try:
        price = float(given)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"{given!r} is no price")
    return price


def _bench(arguments: argparse.Namespace) -> int:
    from velatura.core.recipe import load_recipe

    load_recipe(arguments.recipe, arguments.overrides)  # its mistakes are told before torch is imported

    from velatura.core.bench import Bench, Prices, as_data, stages_of, table, together
    from velatura.core.checkpoint import write_text_atomic
    from velatura.core.cli.console import say_through
    from velatura.core.pipeline import plan_run

    console = new_console()
    say_through(console)
    plan = plan_run(arguments.recipe, arguments.overrides)
    given = (arguments.prompt_price, arguments.completion_price)
    prices = None if given == (None, None) else Prices(prompt=given[0] or 0.0, completion=given[1] or 0.0)
    size, device = arguments.batch, arguments.device
    benches = [
        Bench(plan=plan, stage=stage, device=device, calls=arguments.calls, batch=size, prices=prices)
        for stage in stages_of(plan, arguments.stage)
    ]
    rows, silent = _measured(benches, console)
    console.print(table(rows, silent))
    for stage, (beside, after) in together(rows).items():
        console.print(
            f"{stage}: {beside:.3g} s of scoring a step if its rewards work beside each other, {after:.3g} s one after "
            f"the other",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    for row in rows:
        if row.reason:
            console.print(
                f"{row.stage}, {row.reward}: {row.failed:.1%} failed, the last: {row.reason}",
                markup=False,
                soft_wrap=True,
            )
    for stage, label in silent:
        console.print(f"{stage}, {label}: applies to none of the prompts", markup=False)
    if arguments.json is not None:
        write_text_atomic(arguments.json, json.dumps(as_data(rows, silent), indent=2) + "\n")
    return 0


def _measured(benches: list[Bench], console: Console) -> tuple[list[Measured], list[tuple[str, str]]]:
    """Every reward of every stage, one after the other, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rows: list[Measured] = []
    silent: list[tuple[str, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
               TextColumn("calls"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        for bench in benches:
            for index, ref in enumerate(bench.plan.recipe.stage(bench.stage).rewards):  # type: ignore[union-attr]
                bar = bars.add_task(f"{bench.stage}, {ref.label}", total=bench.calls + 1)
                row = bench.measure(index, ref, lambda bar=bar: bars.advance(bar))  # type: ignore[misc]
                bars.remove_task(bar)
                rows += [] if row is None else [row]
                silent += [(bench.stage, ref.label)] if row is None else []
    return rows, silent
