"""Every process watches the others: when one is gone or stands still, all end, and one of them says which it was.

Each process tells a store, every few seconds, what it does and for how long. The first reads all of that; the others
read what the first tells, so that a process costs the same among eight as among a thousand. Whoever finds a cause puts
it into the store once: the first cause is the one that is told.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from loguru import logger

from velatura.core.errors import Stopped, VelaturaError
from velatura.core.pulse import alive, sign
from velatura.core.ranks import FailedElsewhere, Ranks

PERIOD = 2.0
"""Seconds between two beats, at most; a tenth of a shorter time-out."""
SOON = 4
"""Beats that are waited for where a broken connection says that somebody is gone."""
ENDED = 2
"""Exit status of a process that ends because of another."""
CAUSE, SAID, BEAT, SUSPECT, READ = "cause", "said", "beat", "suspect", "read"
"""What is in the store."""
FAILED = "failed: "
"""How the message of a process begins that met an error nobody expected, which it has kept itself."""
VERBS = ("has been ", "has not ", "and all ", "cannot be ", FAILED)
"""How messages begin that say what a process did; others are its own."""
COLLECTIVES = str(Path("torch", "distributed", "distributed_c10d.py"))
"""Where torch waits for other processes."""
NEARLY = 0.8
"""Part of the time-out after which a process is named beside one that stands still."""
NAMED = 3
"""Processes that are named beside the first, where several stand still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What one process tells of itself."""

    number: int
    what: str
    seconds: float
    """How long it has been at that."""
    waiting: bool
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """The newest beat of a process, and how long ago it came, by the clock of whoever listens."""

    beat: Beat | None
    silent: float


def gone(heard: Sequence[Heard], allowed: float) -> tuple[int, str] | None:
    """The process that has been silent longest, and for more than `allowed` seconds, with what is to be said of it."""
    rank = max(range(len(heard)), key=lambda rank: heard[rank].silent)
    if heard[rank].silent <= allowed:
        return None
    beat = heard[rank].beat
    last = f" It was last at: {beat.what}." if beat else ""
    return rank, f"has not been heard of for {heard[rank].silent:.0f} s.{last} It was killed, or its machine froze."


def standing(heard: Sequence[Heard], patience: float) -> tuple[int, str] | None:
    """Of all processes the one that has stood still longest, and for more than `patience` seconds, with what is to be
    said of it; one that waits for others does not stand still, unless all do."""
    beats = [each.beat for each in heard]
    if any(beat is None for beat in beats):
        return None
    known = [beat for beat in beats if beat is not None]
    still = [rank for rank, beat in enumerate(known) if beat.seconds > patience and not beat.waiting]
    if still:
        still += [r for r, b in enumerate(known) if r not in still and not b.waiting and b.seconds > NEARLY * patience]
    together = not still and all(beat.seconds > patience for beat in known)
    if not still and not together:
        return None
    ranked = sorted(still or range(len(known)), key=lambda rank: -known[rank].seconds)
    first, seconds = known[ranked[0]], known[ranked[0]].seconds
    if together:
        return ranked[0], f"and all others have waited for each other for {seconds:.0f} s; it at: {first.what}."
    others = ", ".join(f"{rank} ({known[rank].what})" for rank in ranked[1 : 1 + NAMED])
    return ranked[0], (
        f"has been at one thing for {seconds:.0f} s: {first.what}.{f' Then stood still: {others}.' if others else ''} "
        f"If it needs so long, raise engine.timeout ({patience:g} s)."
    )


class Watch:
    """The watch of one process, a thread of its own, so that it goes on while the process waits inside a library."""

    def __init__(
        self, ranks: Ranks, store: Any, patience: float, logs: Path, keep: Callable[[str], object] | None = None
    ) -> None:
        """`store`: a torch store of this watch's own. `patience`: seconds without a sign of life. `logs`: folder of the
        processes' logs. `keep`: is given what is said of a process that could not say it itself."""
        self.ranks, self.store, self.patience, self.logs, self.keep = ranks, store, patience, logs, keep
        self.period = min(PERIOD, patience / 10)
        self._heard: list[tuple[Beat | None, float]] = [(None, time.monotonic())] * ranks.size
        self._stop, self._lock, self._told = threading.Event(), threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to tell and to listen."""
        alive("the start of the run")
        self._thread.start()

    def stop(self) -> None:
        """This process has done its part."""
        self._stop.set()
        self._thread.join(timeout=SOON * self.period)

    def failed(self, error: BaseException) -> None:
        """This process ends by `error`: the others are told, unless something else came first.

        Raises:
            FailedElsewhere: another process is the cause, or tells this one's.
        """
        if not isinstance(error, Exception) or isinstance(error, Stopped):  # all stop together, and the first says it
            return
        if isinstance(error, FailedElsewhere):
            time.sleep(self.period)  # launchers end all when one ends: let the first process say what is wrong
            return
        if _is_of_a_connection(error):
            with suppress(RuntimeError):
                self.store.set(SUSPECT, "1")
            time.sleep(2 * SOON * self.period)  # the watch ends this process where it finds out who is gone
        self._stop.set()
        known = isinstance(error, VelaturaError)
        message = str(error) if known else f"{FAILED}{type(error).__name__}: {error}"
        found = self._publish(self.ranks.rank, message, machine=socket.gethostname())
        if self.ranks.first:
            atexit.register(self._linger)
            with self._lock:
                mine = not self._told and (found["rank"] == 0 or found["message"] == message)
                self._told = self._told or mine
            if not mine:
                self._tell(found)
                raise FailedElsewhere("another process failed first") from error
            return
        if not known:
            logger.opt(exception=error).error("this process failed")
        if self._is_said() or found["rank"] != self.ranks.rank:
            raise FailedElsewhere("the first process says what is wrong") from error

    def _run(self) -> None:
        number, last = 0, time.monotonic()
        while not self._stop.wait(self.period if number else 0):
            number += 1
            try:
                self._round(number)
                last = time.monotonic()
            except RuntimeError as error:  # what torch's stores raise
                silent = time.monotonic() - last
                if silent > min(self.patience, SOON * self.period) and not self._stop.is_set():
                    self._lost(error)

    def _lost(self, error: RuntimeError) -> None:
        """The store is gone, and with it the process or the launcher that held it."""
        first, _ = self._heard[0]
        here = first is not None and first.machine == socket.gethostname()  # then the machine's own first may be gone
        if os.environ.get("LOCAL_RANK", "0") in (("0", "1") if here else ("0",)):  # they cannot agree any more on one
            reason = str(error).splitlines()[0]
            self._tell(
                {
                    "rank": 0,
                    "machine": os.environ["MASTER_ADDR"],
                    "message": f"cannot be reached any more; it, its launcher or its machine ended ({reason}).",
                }
            )
        os._exit(ENDED)

    def _round(self, number: int) -> None:
        """Tell, and listen."""
        now, own = sign(), socket.gethostname()
        where, collective = main_thread()
        beat = Beat(
            number=number,
            what=f"{now.what}{where}",
            seconds=now.seconds,
            waiting=now.waiting or collective,
            machine=own,
        )
        self.store.set(f"{BEAT}/{self.ranks.rank}", json.dumps(asdict(beat)))
        if self.store.check([CAUSE]):
            found = json.loads(self.store.get(CAUSE))
        else:
            others = list(range(self.ranks.size)) if self.ranks.first else [0]
            self._listen(others)
            silence = SOON * self.period if self.store.check([SUSPECT]) else self.patience
            heard = [self._age(rank) for rank in others]
            bad = gone(heard, silence) or (standing(heard, self.patience) if self.ranks.first else None)
            if bad is None:
                return
            last = self._heard[bad[0]][0]
            found = self._publish(*bad, machine=last.machine if last else "")
        if self._stop.is_set():
            return
        told_by_me = self.ranks.first or (found["rank"] == 0 and found["by"] == self.ranks.rank)
        if told_by_me or (not self._is_said() and found["by"] == self.ranks.rank):
            self._tell(found)
        self._end()

    def _listen(self, others: list[int]) -> None:
        """The newest beats."""
        there = [rank for rank in others if self.store.check([f"{BEAT}/{rank}"])]
        texts = self.store.multi_get([f"{BEAT}/{rank}" for rank in there]) if there else []
        for rank, text in zip(there, texts, strict=True):
            beat, before = Beat(**json.loads(text)), self._heard[rank][0]
            if before is None or beat.number != before.number:
                self._heard[rank] = (beat, time.monotonic())

    def _age(self, rank: int) -> Heard:
        beat, when = self._heard[rank]
        return Heard(beat=beat, silent=time.monotonic() - when)

    def _publish(self, rank: int, message: str, *, machine: str) -> dict[str, Any]:
        """The cause that came first: this one, or what another process has put there."""
        cause = {"rank": rank, "message": message, "machine": machine, "by": self.ranks.rank}
        try:
            first: dict[str, Any] = json.loads(self.store.compare_set(CAUSE, "", json.dumps(cause)))
        except RuntimeError:
            return cause
        return first

    def _tell(self, cause: dict[str, Any]) -> None:
        """The one message."""
        with self._lock:
            if self._told:
                return
            self._told = True
        where = f" on {cause['machine']}" if cause["machine"] else ""
        log = self.logs / f"process-{cause['rank']}.log"
        more = f" Its log: {log}." if cause["rank"] > 0 else ""
        message = (
            f"process {cause['rank']}{where} {_joined(cause['message'])}{more} All processes were ended; the same "
            f"command goes on from the last checkpoint."
        )
        shown = "\033[?25h" if sys.stdout.isatty() else ""  # a progress bar hides the cursor
        print(f"{shown}velatura: {message}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            self.store.set(SAID, "1")
        if self.keep is not None and cause["message"].startswith(VERBS) and not cause["message"].startswith(FAILED):
            writing = threading.Thread(target=self.keep, args=(message,), daemon=True)
            writing.start()
            writing.join(SOON * self.period)  # a file system that hangs may be the cause

    def _is_said(self) -> bool:
        """Whether the cause has been said, waited for a while."""
        until = time.monotonic() + SOON * self.period
        while time.monotonic() < until:
            with suppress(RuntimeError):
                if self.store.check([SAID]):
                    return True
            time.sleep(self.period / 4)
        return False

    def _end(self) -> None:
        """End this process, whatever its main thread waits for."""
        logger.debug("this process ends, because another did")
        self._linger()
        os._exit(ENDED)

    def _linger(self) -> None:
        """The first process may hold the store: it stays until the others have read it, a while at most."""
        with suppress(RuntimeError):
            self.store.add(READ, 1)
            if not self.ranks.first:
                return
            self.store.set(SAID, "1")
            until = time.monotonic() + SOON * self.period
            while time.monotonic() < until and self.store.add(READ, 0) < self.ranks.size:
                time.sleep(self.period / 4)


def main_thread() -> tuple[str, bool]:
    """Where the main thread is in our code, and whether it waits in a collective of torch's: seen on its stack, so that
    libraries which call collectives need not say so. On a GPU a process may wait for a collective elsewhere."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    collective = False
    while frame is not None:
        path = frame.f_code.co_filename
        collective = collective or path.endswith(COLLECTIVES)
        if f"{os.sep}velatura{os.sep}" in path and not path.endswith(("watch.py", "pulse.py")):
            return f" ({path.rsplit(f'{os.sep}velatura{os.sep}', 1)[1]}, line {frame.f_lineno})", collective
        frame = frame.f_back
    return "", collective


def _joined(message: str) -> str:
    """What a process did wrong, behind its name."""
    return message if message.startswith(VERBS) else f"says: {message}"


def _is_of_a_connection(error: BaseException) -> bool:
    """Whether torch says that it lost another process, or waited in vain."""
    if isinstance(error, VelaturaError) or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    words = ("onnection", "roken pipe", "imed out", "peer", "remote process")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


@contextmanager
def watched(ranks: Ranks, patience: float, logs: Path, keep: Callable[[str], object] | None = None) -> Iterator[None]:
    """Watch over the processes, and let them watch over this one; `keep` is given what is said of one that is gone or
    stands still."""
    if ranks.size == 1:
        yield
        return
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
        timeout=timedelta(seconds=max(1.0, patience)),
    )  # fmt: skip
    watch = Watch(ranks, PrefixStore("velatura-watch", store), patience, logs, keep)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.failed(error)
        raise
    finally:
        watch.stop()
