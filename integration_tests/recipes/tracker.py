"""What a tracking service would be: gives a run an id, and keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from velatura.api import NoOptions, Observer, RunEnd, RunStart, StepEnd, hookimpl


class Tracker(Observer[NoOptions]):
    """Tells a file what it would tell the service, each line with the id of the run."""

    name = "tracker"
    id = ""
    _file = Path()

    def state_dict(self) -> Mapping[str, Any]:
        """The id that the service gave."""
        return {"id": self.id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The run is the same one."""
        self.id = state["id"]

    def run_start(self, event: RunStart) -> None:
        """A new run has no id yet."""
        self.id = self.id or uuid4().hex
        self._file = event.folder / "tracker.jsonl"
        self._tell(start=event.step)

    def step_end(self, event: StepEnd) -> None:
        """A step is over."""
        self._tell(step=event.step)

    def run_end(self, event: RunEnd) -> None:
        """The stage is over."""
        self._tell(end=event.step)

    def _tell(self, **what: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"id": self.id, **what}) + "\n")


@hookimpl
def velatura_observer() -> list[type[Tracker]]:
    """What this file offers."""
    return [Tracker]
