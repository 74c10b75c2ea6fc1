"""`velatura reward-card`: how far a reward agrees with people, how noisy it is, and what it can be fooled with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velatura.core.cli.arguments import Verbs, new_console, new_parser

if TYPE_CHECKING:
    from rich.console import Console

    from velatura.core.cards.card import Subject
    from velatura.core.cards.criteria import Criteria

PASSES, FAILS = 0, 1


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura reward-card recipes/qwen-image-21.yaml --reward alignment --ratings ratings.jsonl"
    summary = "compare a reward with people and perturb its pictures; exit status 1 when it does not pass"
    parser = new_parser(verbs, name, _card, summary, example)
    parser.add_argument("subject", metavar="RECIPE|REWARD", help="a recipe, or the name of a reward")
    parser.add_argument(
        "overrides", nargs="*", metavar="path=value", help="values in place of the recipe's, or options of the reward"
    )
    parser.add_argument("--ratings", type=Path, required=True, metavar="FILE", help="what people said: JSONL")
    parser.add_argument("--reward", metavar="NAME", help="which reward of the recipe")
    parser.add_argument("--stage", metavar="NAME", help="of a recipe, the reward of this stage")
    parser.add_argument("--label", metavar="NAME", help="of one reward, what the card calls it (default: its name)")
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="a plugin file that has the reward")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the card goes (default: cards/NAME)")
    parser.add_argument(
        "--repeats", type=_whole, default=2, metavar="N", help="score pictures N times more (default: 2)"
    )
    parser.add_argument(
        "--perturb", type=_whole, default=64, metavar="N", help="pictures to perturb; 0: none (default: 64)"
    )
    parser.add_argument(
        "--bootstrap", type=_whole, default=2000, metavar="N", help="resamples for intervals (default: 2000)"
    )
    parser.add_argument("--batch", type=_whole, default=16, metavar="N", help="pictures in a call (default: 16)")
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="of resamples and noise (default: 0)")
    parser.add_argument("--device", help="where models live: auto, cpu, cuda or cuda:N; the recipe's by default")
    parser.add_argument("--slice", action="append", default=[], metavar="KEY", help="also slice by this metadata")
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="PERTURBATION=falls|no-gain|any",
        help="what this perturbation should do to the score, in place of what the reward says",
    )
    parser.add_argument(
        "--criterion",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the card asks for, in place of a default, like min_icc=0.7",
    )


def _whole(given: str) -> int:
    if not given.isdecimal():
        raise argparse.ArgumentTypeError(f"{given!r} is no number from 0")
    return int(given)


def _card(arguments: argparse.Namespace) -> int:
    criteria = _criteria(arguments.criterion)

    from velatura.core.cards.card import make_card
    from velatura.core.cards.clusters import Draws
    from velatura.core.cards.file import CARD, PAGE, write_card
    from velatura.core.cards.measures import Options
    from velatura.core.cards.page import page
    from velatura.core.cards.perturb import expected
    from velatura.core.cards.ratings import read_ratings
    from velatura.core.cards.terminal import tables
    from velatura.core.cli.console import say_through

    expect = dict(_parted(text, "--expect") for text in arguments.expect)
    expected("", expect)
    rated = read_ratings(arguments.ratings)
    console = new_console()
    say_through(console)
    subject = _subject(arguments)
    options = Options(
        draws=Draws(bootstrap=max(1, arguments.bootstrap), seed=arguments.seed), repeats=arguments.repeats,
        battery=arguments.perturb, slices=tuple(arguments.slice), expect=expect,
    )  # fmt: skip
    card = _made(console, make_card, subject, rated, options, criteria, batch=max(1, arguments.batch))
    folder = arguments.out or Path("cards") / subject.served.label.replace("/", "-")
    write_card(folder, card, page(card))
    for part in tables(card):
        console.print(part)
    console.print(f"card     {folder / CARD}", markup=False, soft_wrap=True)
    console.print(f"page     {folder / PAGE}", markup=False, soft_wrap=True)
    return PASSES if card["passed"] else FAILS


def _made(console: Console, make: Any, *given: Any, **named: Any) -> dict[str, Any]:
    """The card, with the pictures scored so far on the screen."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} pictures scored"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("reward card", total=None)
        made: dict[str, Any] = make(*given, **named, tick=lambda count: bars.advance(bar, count))
    return made


def _parted(text: str, option: str) -> tuple[str, str]:
    from velatura.core.errors import VelaturaError

    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise VelaturaError(f"{option} takes NAME=VALUE (got {text!r})")
    return name, value


def _criteria(given: list[str]) -> Criteria:
    """The defaults, with what the command line says instead."""
    import yaml
    from pydantic import ValidationError

    from velatura.core.cards.criteria import Criteria
    from velatura.core.errors import VelaturaError
    from velatura.core.explain import complaints

    values = {name: yaml.safe_load(value) for name, value in (_parted(text, "--criterion") for text in given)}
    try:
        return Criteria.model_validate(values)
    except ValidationError as error:
        said = [
            f"--criterion {'.'.join(map(str, at))}: {what}" for at, what in complaints(error, Criteria, "criterion")
        ]
        raise VelaturaError("\n".join(said)) from error


def _subject(arguments: argparse.Namespace) -> Subject:
    """What the card is about: a file is a recipe, then the name of a reward counts, then that of a shipped recipe."""
    from velatura.core.cards.subject import subject_by_name, subject_of_recipe
    from velatura.core.errors import VelaturaError
    from velatura.core.pipeline import plan_run
    from velatura.core.served import is_reward, unknown
    from velatura.core.shipped import find_recipe

    given, path = arguments.subject, find_recipe(Path(arguments.subject))
    is_file = Path(given).suffix in (".yaml", ".yml") or Path(given).is_file()
    if not is_file and is_reward(given, arguments.file):
        if arguments.stage is not None or arguments.reward is not None:
            raise VelaturaError(f"--stage and --reward are for recipes, and {given!r} is a reward")
        label = arguments.label or given
        return subject_by_name(given, arguments.overrides, arguments.file, arguments.device, label)
    if not is_file and not path.is_file():
        raise unknown(given)
    if arguments.label is not None or arguments.file:
        raise VelaturaError("--label and --file are for a single reward; a recipe has its own `name` and `plugins`")
    return subject_of_recipe(plan_run(path, arguments.overrides), arguments.reward, arguments.stage, arguments.device)
