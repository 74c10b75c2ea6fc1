"""Stopping in order: a run that is asked to stop ends its step, saves, and leaves with a status of its own.

SIGTERM, which schedulers send before they take a machine away, and the first SIGINT (Ctrl-C) ask. A second SIGINT ends
the process at once; what was saved before is intact in either case.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""Exit status of a run that was asked to stop and saved its state: EX_TEMPFAIL of sysexits.h, try again."""
LAUNCHER = "VELATURA_LAUNCHER"
"""Set for the processes of our own launcher. It passes requests on as SIGINT, so that SIGTERM, with which it ends the
others when one has died, still ends a process that waits for the dead one."""


class Interruption:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @property
    def asked(self) -> bool:
        """Whether a request came to this process."""
        return self.signal is not None

    @contextmanager
    def listen(self, *, tell: bool) -> Iterator[None]:
        """Take signals as requests inside. `tell`: say so on stderr. Outside the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._note(number, tell)

        numbers = (signal.SIGINT,) if LAUNCHER in os.environ else (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, note) for number in numbers}
        self.signal = None
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.signal = None

    def _note(self, number: int, tell: bool) -> None:
        if self.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # schedulers and launchers repeat themselves
        self.signal = signal.Signals(number).name
        if tell:  # not by print: a handler may run amid another print
            os.write(2, f"velatura: {self.signal}: saving after this step; Ctrl-C now stops at once\n".encode())


INTERRUPTION = Interruption()
"""That of this process: signals belong to it as a whole."""
