"""`velatura serve-reward`: rewards behind HTTP, for recipes that name them with `use: http`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from velatura.core.cli.arguments import Verbs, new_parser

if TYPE_CHECKING:
    from velatura.core.served import Served


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura serve-reward function file=./redness.py call=redness --label redness --port 8188"
    parser = new_parser(verbs, name, _serve, "serve the rewards of a recipe, or one reward, over HTTP", example)
    parser.add_argument("served", metavar="RECIPE|REWARD", help="a recipe, or the name of a reward")
    parser.add_argument(
        "overrides", nargs="*", metavar="path=value", help="values in place of the recipe's, or options of the reward"
    )
    parser.add_argument("--stage", metavar="NAME", help="of a recipe, only the rewards of this stage")
    parser.add_argument("--label", metavar="NAME", help="of one reward, what requests call it (default: its name)")
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="a plugin file that has the reward")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8188, help="port to listen at; 0 takes a free one (default: 8188)")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the token that requests need")
    parser.add_argument("--device", help="where models live: auto, cpu, cuda or cuda:N; the recipe's by default")
    parser.add_argument(
        "--batch", type=_count, default=16, metavar="N", help="pictures a model sees at a time (default: 16)"
    )
    parser.add_argument(
        "--max-pictures", type=_count, default=64, metavar="N", help="pictures in a request (default: 64)"
    )
    parser.add_argument(
        "--max-bytes", type=_count, default=2**28, metavar="N", help="bytes of a request (default: 268435456, 256 MiB)"
    )
    parser.add_argument("--max-requests", type=_count, default=32, metavar="N", help="requests at a time (default: 32)")


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is no number from 1")
    return int(given)


def _serve(arguments: argparse.Namespace) -> int:
    token = _token(arguments.token_env)

    from velatura.core.cli.arguments import new_console
    from velatura.core.cli.console import say_through
    from velatura.core.serving import Limits, RewardServer

    console = new_console()
    say_through(console)
    if token is None and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        console.print(f"anybody who reaches {arguments.host} can ask this server; --token-env NAME asks for a token")
    limits = Limits(
        bytes=arguments.max_bytes, pictures=arguments.max_pictures, requests=arguments.max_requests,
        batch=arguments.batch,
    )  # fmt: skip
    rewards = _rewards(arguments)
    server = RewardServer(rewards, arguments.host, arguments.port, token, limits)
    for served in rewards:
        console.print(f"{served.label}: {served.use}, version {served.version}", markup=False)
    print(f"serving at {server.address} until Ctrl-C", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        console.print("stopped")
    return 0


def _token(variable: str | None) -> str | None:
    import os

    from velatura.core.errors import VelaturaError

    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not token:
        raise VelaturaError(
            f"the environment has no {variable}, which --token-env names. Set it to a long random text."
        )
    return token


def _rewards(arguments: argparse.Namespace) -> list[Served]:
    """What to serve: a file is a recipe, then the name of a reward counts, then that of a recipe that ships."""
    from velatura.core.errors import VelaturaError
    from velatura.core.pipeline import plan_run
    from velatura.core.served import is_reward, reward_by_name, rewards_of_recipe, unknown
    from velatura.core.shipped import find_recipe

    given, path = arguments.served, find_recipe(Path(arguments.served))
    is_file = Path(given).suffix in (".yaml", ".yml") or Path(given).is_file()
    if not is_file and is_reward(given, arguments.file):
        if arguments.stage is not None:
            raise VelaturaError(f"--stage is for recipes, and {given!r} is a reward")
        label = arguments.label or given
        return [reward_by_name(given, arguments.overrides, arguments.file, arguments.device, label)]
    if not is_file and not path.is_file():
        raise unknown(given)
    if arguments.label is not None or arguments.file:
        raise VelaturaError("--label and --file are for a single reward; a recipe has its own `name` and `plugins`")
    return rewards_of_recipe(plan_run(path, arguments.overrides), arguments.device, arguments.stage)
