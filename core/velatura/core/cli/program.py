"""`velatura VERB ...`: find the verb, run it, and turn what goes wrong into a message and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from velatura.core import __version__
from velatura.core.cli import (
    ablate,
    check,
    completion,
    evaluate,
    export,
    new_plugin,
    plugins,
    replay,
    report,
    reward_card,
    rewards,
    run,
    sample,
    schema,
    serve_reward,
)
from velatura.core.deprecation import tell_plainly
from velatura.core.errors import Stopped, VelaturaError, suggest
from velatura.core.interruption import STOPPED
from velatura.core.ranks import FailedElsewhere, rank, world_size
from velatura.core.slurm import adopt_slurm

VERBS = {
    "run": run,
    "check": check,
    "eval": evaluate,
    "report": report,
    "export": export,
    "sample": sample,
    "ablate": ablate,
    "replay": replay,
    "rewards": rewards,
    "reward-card": reward_card,
    "serve-reward": serve_reward,
    "plugins": plugins,
    "new-plugin": new_plugin,
    "schema": schema,
    "completion": completion,
}
"""In the order of `--help`."""

OK, USER_ERROR, INTERRUPTED = 0, 2, 130
FAREWELL = 10.0
"""Seconds that a process waits before it ends because of what another one is about to say."""


def main(argv: Sequence[str] | None = None, *, launched: bool = False) -> int:
    """Do what the command line says. 0: done; 1: done, and what was measured does not pass; 2: the user can mend it,
    one message says how; 75: it was asked to stop and has saved its state; 130: Ctrl-C, at once.

    `launched`: one of several processes; who started them says that they were interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    tell_plainly()
    # Before torch is loaded. Threads that spin long while they wait take the cores from those they wait for as soon as
    # the machine does anything else: two threads beside one busy process were thirty times slower than one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if arguments and arguments[0].startswith("--local_rank=") and "LOCAL_RANK" in os.environ:  # DeepSpeed's launcher
        del arguments[0]
    try:
        adopt_slurm(os.environ)
        if world_size() > 1:  # a process says itself that it lost another, on one line
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        return _dispatch(arguments)
    except VelaturaError as error:
        return _said(error)
    except FileNotFoundError as error:
        print(f"velatura: there is no file {str(error.filename or error)!r}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if not launched:
            print("velatura: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `velatura plugins list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except SystemExit as stop:  # argparse has said what there is to say
        return stop.code if isinstance(stop.code, int) else OK


def _said(error: VelaturaError) -> int:
    """Print what is wrong, once for all processes, and return the exit status."""
    if isinstance(error, FailedElsewhere):
        return USER_ERROR
    if isinstance(error, Stopped):
        if rank() > 0:  # the first process says it; until it has, nothing here may look like a failure
            return OK
        print(f"velatura: {error}; the same command goes on from there (exit status {STOPPED})", file=sys.stderr)
        return STOPPED
    if rank() > 0:  # what all processes find wrong the first one says, and then the launcher ends this one
        time.sleep(FAREWELL)
    print(f"velatura: {error}", file=sys.stderr)
    return USER_ERROR


def _dispatch(arguments: list[str]) -> int:
    """Parse, and call the verb."""
    parser = _parser()
    if not arguments:
        parser.print_help()
        return OK
    if not arguments[0].startswith("-") and arguments[0] not in VERBS:
        hint = ""
        if Path(arguments[0]).suffix in (".yaml", ".yml"):
            hint = f" To run a recipe: velatura run {arguments[0]}"
        raise VelaturaError(f"there is no command {arguments[0]!r}.{hint or suggest(arguments[0], VERBS)}")
    parsed, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(parsed, "overrides")):
        unknown = next(text for text in rest if text not in overrides or not hasattr(parsed, "overrides"))
        raise VelaturaError(f"'velatura {arguments[0]}' does not take {unknown!r}; see velatura {arguments[0]} --help")
    if rest:  # argparse stops collecting overrides at the first option
        parsed.overrides = [*parsed.overrides, *overrides]
    return int(parsed.verb(parsed))


def _parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="velatura",
        description="Post-train flow-matching image models with reinforcement learning and on-policy distillation.",
        epilog="Start with: velatura run recipes/tinyworld.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"velatura {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, verb in VERBS.items():
        verb.add(name, verbs)
    return parser
