"""`report.html`: one file, no script, nothing fetched; what was run, what came of it, how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from velatura.core.pictures import write_bytes_atomic
from velatura.core.report.calibration import read_weights_page
from velatura.core.report.data import Run, Stage, read_run
from velatura.core.report.judging import read_fitted, read_proxies
from velatura.core.report.process import duration, failures, read_course, read_curation, recipe_text
from velatura.core.report.results import Result, read_results
from velatura.core.report.wording import unvalidated

REPORT = "report.html"
TRAINING = ("supervised", "judge-fit", "rl", "distill")


def build_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Only files of the run folder are read. What is missing or damaged is named on the page, not raised.

    Raises:
        VelaturaError: the folder holds no run at all, or the page cannot be written.
    """
    run = read_run(Path(run_folder))
    notes = run.notes
    results = read_results(run.of_kind("evaluate"), notes)
    courses = [read_course(stage, notes) for stage in run.of_kind(*TRAINING)]
    curations = [found for stage in run.of_kind("curate") if (found := read_curation(stage, notes))]
    calibrations = [
        own for stage in [*run.of_kind("calibrate"), *run.of_kind("rl")] if (own := read_weights_page(stage, notes))
    ]
    judges = read_fitted(run.of_kind("judge-fit"), notes)
    if not run.of_kind("evaluate"):
        notes.append("No evaluation has run yet, so there is nothing to compare.")
    page = _environment().get_template("template.html.j2").render(
        title=_title(run),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        run=run,
        started=min((stage.started for stage in run.stages if stage.started), default="")[:16].replace("T", " "),
        seconds=sum(stage.seconds or 0.0 for stage in run.stages),
        notes=list(dict.fromkeys(notes)),
        results=results,
        courses=courses,
        curations=curations,
        calibrations=calibrations,
        judges=judges,
        proxies=read_proxies(run.of_kind("evaluate"), notes) if judges else [],
        failures=failures(run, _missing(results)),
        resolved=recipe_text(run),
        plugins=run.resolved.get("plugins") or [],
        environment=run.resolved.get("environment") or {},
        exports=_exports(run.stages),
        cards=run.resolved.get("cards") or [],
        unvalidated=unvalidated(run.resolved),
    )  # fmt: skip
    path = run.folder / REPORT
    write_bytes_atomic(path, page.encode())
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    return environment


def _title(run: Run) -> str:
    """The name of the run's folder."""
    return run.folder.resolve().name


def _missing(results: Sequence[Result]) -> dict[str, int]:
    """Pictures of a model without a value that another model has: what does not apply is missing from all alike."""
    return {
        f"pictures of {line.model} on {route.route} without {table.name}": line.missing - common
        for result in results
        for route in result.routes
        for table in route.metrics
        for common in (min(line.missing for line in table.lines),)
        for line in table.lines
        if line.missing > common
    }


def _exports(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    return [dict(stage.result) for stage in stages if stage.kind == "export" and stage.status == "finished"]
