"""`velatura ablate`: variants of a recipe over several seeds, a figure and a verdict."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from velatura.core.cli.arguments import Verbs, new_console, new_parser
from velatura.core.cli.console import say_through
from velatura.core.errors import VelaturaError

if TYPE_CHECKING:
    from rich.console import Console


def add(name: str, verbs: Verbs) -> None:
    """Add this verb to the command line."""
    example = "velatura ablate recipes/ablations/guidance.yaml --jobs 2"
    summary = "train the variants of an ablation file with several seeds, then draw a figure and give a verdict"
    parser = new_parser(verbs, name, _ablate, summary, example)
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="ablation files; path=value sets something in all arms"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where runs go (default: runs/ablations)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs side by side (default: one for each core, at most 4)"
    )
    parser.add_argument("--seeds", metavar="0,1,2", help="these seeds in place of the file's")
    parser.add_argument("--only-report", action="store_true", help="run nothing, read what finished runs left")
    parser.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="also copy results and figure, as NAME.json and NAME.svg"
    )


def _ablate(arguments: argparse.Namespace) -> int:
    from velatura.core.ablation.settings import load_ablation

    files = [Path(text) for text in arguments.files if "=" not in text]
    extra = [text for text in arguments.files if "=" in text]
    if not files:
        raise VelaturaError("no ablation file is named. An example: velatura ablate recipes/ablations/guidance.yaml")
    jobs = arguments.jobs if arguments.jobs is not None else min(4, os.cpu_count() or 1)
    if jobs < 1:
        raise VelaturaError(f"--jobs {jobs}: at least one run has to go on.")
    loaded = {path: load_ablation(path) for path in files}
    if arguments.seeds is not None:
        seeds = _seeds(arguments.seeds)
        loaded = {path: found.model_copy(update={"seeds": seeds}) for path, found in loaded.items()}
    output = arguments.output or Path("runs") / "ablations"
    console = new_console()
    say_through(console)
    for path, ablation in loaded.items():
        _one(path, ablation, output / path.stem, extra, jobs, console, arguments)
    return 0


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise VelaturaError(f"--seeds {text}: give different whole numbers from 0 with commas between, like 0,1,2")
    return [int(part) for part in parts]


def _one(
    path: Path, ablation: object, folder: Path, extra: list[str], at_once: int, console: Console,
    arguments: argparse.Namespace,
) -> None:  # fmt: skip
    """One ablation file."""
    from velatura.core.ablation.jobs import check_jobs, jobs_of, run_jobs
    from velatura.core.ablation.results import find, save
    from velatura.core.ablation.settings import Ablation, recipe_path

    assert isinstance(ablation, Ablation)
    jobs = jobs_of(ablation, folder, extra)
    console.print(f"[bold]{ablation.question}[/] {len(set(jobs.values()))} runs in {folder}")
    if not arguments.only_report:
        check_jobs(recipe_path(ablation, path), list(jobs.values()))
        run_jobs(recipe_path(ablation, path), list(jobs.values()), at_once=at_once, console=console)
    findings = find(path.stem, ablation, jobs)
    page = save(findings, folder)
    console.print(f"{findings.verdict.capitalize()}: {ablation.claim}", markup=False, style="bold")
    for test in findings.tested:
        console.print(f"  {test.sentence()}", markup=False)
    console.print(f"verdict  [bold]{page}[/]\nfigure   [bold]{folder / 'figure.svg'}[/]")
    if arguments.publish:
        _publish(folder, arguments.publish, path.stem)


def _publish(folder: Path, target: Path, name: str) -> None:
    import shutil

    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "results.json", target / f"{name}.json")
    shutil.copy(folder / "figure.svg", target / f"{name}.svg")
