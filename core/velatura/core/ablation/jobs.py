"""Which runs an ablation needs, and running them side by side."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from velatura.core.ablation.settings import Ablation
from velatura.core.errors import RecipeError, Stopped, VelaturaError
from velatura.core.interruption import INTERRUPTION

POLL = 0.5
"""Seconds between looks at the runs."""
GRACE = 60.0
"""Seconds that an interrupted run has to leave by itself."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run: arms that set the same things share it."""

    arm: str
    """The first of its arms, which names its folder."""
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.arm} · seed {self.seed}"

    @property
    def log(self) -> Path:
        """What the run said."""
        return self.folder.parent / f"{self.folder.name}.log"


def jobs_of(ablation: Ablation, output: Path, extra: Sequence[str] = ()) -> dict[tuple[str, int], Job]:
    """(arm, seed) -> its run, in the order in which they are best done: all seeds of the first arm, then the others,
    which take over what they have in common with it."""
    found: dict[tuple[str, int], Job] = {}
    first: dict[tuple[str, ...], str] = {}
    for arm in ablation.arms:
        overrides = (*ablation.overrides(arm), *extra)
        name = first.setdefault(overrides, arm)
        for seed in ablation.seeds:
            found[arm, seed] = Job(name, seed, overrides, output / name / f"seed-{seed}")
    return found


def check_jobs(recipe: Path, jobs: Sequence[Job]) -> None:
    """Refuse arms that cannot run before any of them does.

    Raises:
        RecipeError: with the arm, and what is wrong.
    """
    from velatura.core.check import check_combinations
    from velatura.core.pipeline import plan_run

    for overrides, arm in {job.overrides: job.arm for job in jobs}.items():
        try:
            plan = plan_run(recipe, overrides)
            check_combinations(plan.recipe, plan.registry)
        except RecipeError as error:
            raise RecipeError(f"arm '{arm}': {error}") from error


def run_jobs(recipe: Path, jobs: Sequence[Job], *, at_once: int, console: Console | None) -> None:
    """Run what is missing, `at_once` runs side by side with an equal share of the cores each.

    A run of another arm waits for the first arm's run of its seed and takes over finished stages that are the same in
    both. One that fails does not end the others.

    Raises:
        VelaturaError: runs failed; what each said last is told.
        Stopped: SIGTERM or Ctrl-C; the runs that were going on have saved what they had.
    """
    every = list(dict.fromkeys(jobs))
    leaders = {job.seed: job.arm for job in reversed(every)}
    waiting = list(every)
    threads = max(1, (os.cpu_count() or 1) // at_once)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    ended: dict[Job, int] = {}
    with INTERRUPTION.listen(tell=True), Bars(console, len(waiting)) as bars:
        try:
            while waiting or running:
                if INTERRUPTION.asked:
                    raise Stopped(
                        f"{INTERRUPTION.signal}: {len(ended)} of {len(every)} runs are done, others are saved"
                    )
                for job in _ready(waiting, ended, leaders, at_once - len(running)):
                    waiting.remove(job)
                    running[job] = _start(recipe, job, every, threads)
                for job, process in list(running.items()):
                    bars.show(job)
                    if process.poll() is not None:
                        ended[job] = running.pop(job).wait()
                        bars.end(job, failed=ended[job] != 0)
                time.sleep(POLL)
        finally:
            _stop(running)
    failed = [job for job, status in ended.items() if status]
    if failed:
        told = "\n".join(f"  {job.label}: {_last_line(job.log)} (all of it in {job.log})" for job in failed)
        raise VelaturaError(f"{len(failed)} of {len(ended)} runs failed; the same command goes on with them:\n{told}")


def _ready(waiting: Sequence[Job], ended: Mapping[Job, int], leaders: Mapping[int, str], room: int) -> list[Job]:
    """The next jobs that may begin: the first arm of a seed, or any other once that is over."""
    over = {(job.arm, job.seed) for job in ended}
    free = [job for job in waiting if job.arm == leaders[job.seed] or (leaders[job.seed], job.seed) in over]
    return free[: max(0, room)]


def _start(recipe: Path, job: Job, others: Sequence[Job], threads: int) -> subprocess.Popen[bytes]:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    overrides = [*job.overrides, f"seed={job.seed}", f"output={job.folder}", f"engine.threads={threads}"]
    siblings = [other.folder for other in others if other.seed == job.seed]
    elsewhere = sorted(
        job.folder.parents[2].glob(f"*/*/{job.folder.name}")
    )  # other ablations of the same output folder
    borrow(recipe, overrides, job.folder, [*siblings, *(found for found in elsewhere if found not in siblings)])
    command = [sys.executable, "-m", "velatura.core.cli", "run", str(recipe), *overrides]
    with job.log.open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip


def borrow(recipe: Path, overrides: Sequence[str], folder: Path, others: Sequence[Path]) -> list[str]:
    """Copy finished stages of other runs that this run would do just the same; returns their names."""
    from velatura.core.inputs import difference
    from velatura.core.pipeline import mark, plan_run, stage_inputs

    plan = plan_run(recipe, overrides)
    taken = []
    for name in plan.recipe.order():
        if (folder / name).exists():
            continue
        found = {other / name: _manifest(other / name) for other in others if other != folder}
        kind = plan.recipe.stage(name).stage
        found = {at: own for at, own in found.items() if own.get("status") == "finished" and own.get("kind") == kind}
        wanted = stage_inputs(plan, name) if found else {}
        source = next((at for at, own in found.items() if not difference(own["inputs"], wanted)), None)
        if source is None:
            continue
        temporary = folder.parent / f".{folder.name}-{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        if not (folder / "run.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            mark(folder, recipe, overrides)
        temporary.rename(folder / name)
        taken.append(name)
    if taken:
        logger.debug("{}: taken over from another arm: {}", folder, ", ".join(taken))
    return taken


def _manifest(stage: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((stage / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def _stop(running: dict[Job, subprocess.Popen[bytes]]) -> None:
    """Interrupt what still runs; each saves what it has."""
    for process in running.values():
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
    for process in running.values():
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("velatura: ")]
    return (said or lines or ["it said nothing"])[-1]


class Bars:
    """One bar for all runs, and a line for each that is running."""

    def __init__(self, console: Console | None, total: int) -> None:
        self._bars = Progress(
            SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console, disable=console is None,
        )  # fmt: skip
        self._all = self._bars.add_task("runs", total=total, note="")
        self._one: dict[Job, TaskID] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, job: Job) -> None:
        """Where a run is now."""
        if job not in self._one:
            self._one[job] = self._bars.add_task(job.label, total=None, note="")
        stage, done, total = where(job.folder)
        self._bars.update(self._one[job], total=total or None, completed=done, note=stage)

    def end(self, job: Job, *, failed: bool) -> None:
        """A run is over."""
        self._bars.remove_task(self._one.pop(job))
        self._bars.advance(self._all)
        if failed:
            self._bars.console.print(f"{job.label}: failed, see {job.log}", style="red", markup=False)


def where(folder: Path) -> tuple[str, int, int]:
    """The stage that a run is in, its steps so far, and how many it has (0 where it counts none)."""
    for path in folder.glob("*/manifest.json"):
        if _manifest(path.parent).get("status") != "running":
            continue
        log = path.parent / "metrics.jsonl"
        done = log.read_bytes().count(b"\n") if log.exists() else 0
        return path.parent.name, done, _steps(folder, path.parent.name)
    return "", 0, 0


def _steps(folder: Path, stage: str) -> int:
    try:
        stages = json.loads((folder / "resolved.json").read_text())["recipe"]["stages"]
    except (OSError, ValueError, KeyError):
        return 0
    return int(stages.get(stage, {}).get("steps") or 0)
