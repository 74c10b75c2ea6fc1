"""What a component that only watches takes with it over an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Remembers:
    """Has a state that goes into checkpoints as JSON."""

    def state_dict(self) -> Mapping[str, Any]:
        """What it needs to go on, such as the tracker's id of this run; nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; called before `run_start` of a run that is resumed."""
