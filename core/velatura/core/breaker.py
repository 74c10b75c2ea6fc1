"""A reward that fails again and again is left alone for a while, instead of being waited for picture by picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loguru import logger

from velatura.core.reward_settings import Breaker
from velatura.core.types import Status


@dataclass(slots=True)
class CircuitBreaker:
    """Closed while scores come; open for `cool_down` seconds after `after` failures in a row; then half open: one
    picture is tried, and decides."""

    label: str
    settings: Breaker | None
    """None never opens."""
    clock: Callable[[], float] = time.monotonic
    _in_a_row: int = 0
    _reason: str = ""
    _opened: float | None = field(default=None)

    @property
    def is_open(self) -> bool:
        """Whether the reward must not be asked now."""
        if self.settings is None or self._opened is None:
            return False
        return self.clock() - self._opened < self.settings.cool_down

    @property
    def is_half_open(self) -> bool:
        """Whether one picture is to be tried before the others."""
        return self._opened is not None and not self.is_open

    @property
    def reason(self) -> str:
        """Why nothing is asked, for the pictures that get no score."""
        return f"not asked: {self._in_a_row} failures in a row, the last: {self._reason}"

    def note(self, status: Sequence[Status], reasons: Sequence[str]) -> None:
        """What became of some pictures, in their order. A refusal or N/A is an answer."""
        for one, reason in zip(status, reasons or [""] * len(status), strict=True):
            if one is not Status.FAILED:
                if self._opened is not None:
                    logger.info("reward '{}' answers again", self.label)
                self._in_a_row, self._opened = 0, None
                continue
            self._in_a_row, self._reason = self._in_a_row + 1, reason
        if self.settings is not None and self._in_a_row >= self.settings.after and not self.is_open:
            self._opened = self.clock()
            logger.warning(
                "reward '{}' failed {} times in a row and is left alone for {:g} s: {}",
                self.label, self._in_a_row, self.settings.cool_down, self._reason,
            )  # fmt: skip
