"""What a person sees at the end of a run: the comparison, where things are, and what to do next."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from velatura.core.report import build_report, summary_table
from velatura.core.report.wording import unvalidated


def close(folder: Path, console: Console) -> None:
    """Write the report and print the closing summary."""
    report = build_report(folder)
    console.print()
    for path in sorted(folder.glob("*/summary.json")):
        console.print(summary_table(json.loads(path.read_text())))
    for sentence in unvalidated(json.loads((folder / "resolved.json").read_text())):
        console.print(f"warning  {sentence}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"report   [bold]{report}[/]")
    model = None
    for path in sorted(folder.glob("*/manifest.json")):
        manifest = json.loads(path.read_text())
        if manifest["kind"] == "export" and manifest["status"] == "finished":
            model = manifest["result"]["folder"]
            console.print(f"model    [bold]{model}[/]")
    text = _a_prompt(folder)
    if model and text:
        console.print(f'next     [bold]velatura sample {folder} "{text}" --out drawn.png[/]')


def _a_prompt(folder: Path) -> str | None:
    """A prompt that the evaluation used and that needs no source image."""
    for path in sorted(folder.glob("*/samples.parquet")):
        with_sources = {p.stem for p in (path.parent / "images" / "sources").glob("*.npz")}
        table = pq.read_table(path, columns=["route", "text"]).to_pylist()
        for row in table:
            if row["route"] not in with_sources:
                return str(row["text"])
    return None
