"""An observer: hears of every event, and cannot change anything."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from velatura.api import Observer, Options, RunEnd, RunStart, StepEnd


class DiaryOptions(Options):
    """Options of `diary`."""

    file: str = Field("diary.jsonl", description="Name of the file in the folder of the stage.")


class Diary(Observer[DiaryOptions]):
    """Writes the metrics of every step, and how the stage ended, one JSON object a line."""

    name = "diary"

    _path: Path | None = None

    def run_start(self, event: RunStart) -> None:
        """A stage begins, or goes on at `event.step`."""
        self._path = event.folder / self.options.file

    def step_end(self, event: StepEnd) -> None:
        """One step is over."""
        self._write({"step": event.step, **event.metrics})

    def run_end(self, event: RunEnd) -> None:
        """The stage is over; `error` says why it failed, where it did."""
        self._write({"steps": event.step, "error": event.error})

    def _write(self, line: dict[str, object]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
