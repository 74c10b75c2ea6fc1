"""`velatura run`: do what is missing of a recipe."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from velatura.core.cli.arguments import Verbs, add_recipe, new_console, new_parser
from velatura.core.cli.console import say_nothing, say_through
from velatura.core.errors import VelaturaError
from velatura.core.hostfile import is_here, read_hostfile, start_on
from velatura.core.interruption import INTERRUPTION
from velatura.core.ranks import rank, world_size
from velatura.core.slurm import without_srun

if TYPE_CHECKING:
    from velatura.core.recipe import Recipe


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura run recipes/tinyworld.yaml stages.teacher_t2i.steps=40 seed=1"
    summary = "run the stages of a recipe, skipping those that are done and unchanged"
    parser = new_parser(verbs, name, _run, summary, example)
    add_recipe(parser)
    parser.add_argument("--stage", metavar="NAME", help="only this stage; what it builds on must be done")
    parser.add_argument("--fresh", action="store_true", help="do every stage again, whatever is there")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="share the work among N processes of this machine, usually one for each GPU; the result is that of one "
        "process up to the rounding of sums",
    )  # fmt: skip
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE",
        help="share the work among the processes of several machines, each a line like 'worker-1 slots=8'; ssh has to "
        "reach them, and this folder has to be the same on all",
    )  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    from velatura.core.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)  # its mistakes are told before torch is imported
    if arguments.stage is not None:
        recipe.stage(arguments.stage)
    machines = read_hostfile(arguments.hostfile) if arguments.hostfile is not None else {}
    if machines and arguments.processes > 1:
        raise VelaturaError("--processes and --hostfile, whose slots say how many processes there are. Leave one out.")
    check_processes(sum(machines.values()) or arguments.processes, recipe, "--hostfile" if machines else "--processes")
    if len(machines) > 1 or any(not is_here(name) for name in machines):
        return start_on(machines, arguments.hostfile.resolve(), _again(arguments))
    if (processes := sum(machines.values()) or arguments.processes) > 1:
        return _launch(arguments, recipe, processes)
    if forgotten := without_srun(os.environ):
        print(f"velatura: {forgotten}", file=sys.stderr)

    from velatura.core.closing import close
    from velatura.core.pipeline import run_pipeline

    first = rank() == 0
    console = new_console() if first else None
    if console is not None:
        say_through(console)
    else:
        say_nothing()
    options = {"only": arguments.stage, "fresh": arguments.fresh, "console": console}
    with INTERRUPTION.listen(tell=first):
        folder = run_pipeline(arguments.recipe, arguments.overrides, **options)
    if console is not None:
        close(folder, console)
    return 0


def check_processes(processes: int, recipe: Recipe, option: str = "--processes") -> None:
    """Refuse what cannot be started, or would be started twice."""
    if processes < 1:
        raise VelaturaError(f"{option} {processes}: at least one process has to do the work.")
    if processes > 1 and world_size() > 1:
        raise VelaturaError(
            f"{option}: {processes} processes, but a launcher has already started {world_size()} (WORLD_SIZE is set). "
            f"Leave one of the two out."
        )
    if recipe.engine.kind == "local" and max(processes, world_size()) > 1:
        raise VelaturaError(
            f"{recipe.at(('engine', 'kind'))}: 'local' is one process, and {max(processes, world_size())} are asked "
            f"for. Use 'deepspeed', or one process."
        )


def _launch(arguments: argparse.Namespace, recipe: Recipe, processes: int) -> int:
    """The same command in several processes of this machine; what they left unsaid is said in the stage's manifest."""
    from velatura.core.launch import launch
    from velatura.core.pipeline import close_cut_off, run_folder

    begin = time.time()
    try:
        return launch(_again(arguments), processes)
    except VelaturaError as error:
        close_cut_off(run_folder(recipe, Path(arguments.recipe)), begin, str(error))
        raise


def _again(arguments: argparse.Namespace) -> list[str]:
    """The command line of each process."""
    options = ["--stage", arguments.stage] if arguments.stage is not None else []
    options += ["--fresh"] if arguments.fresh else []
    return ["run", str(arguments.recipe), *arguments.overrides, *options]
