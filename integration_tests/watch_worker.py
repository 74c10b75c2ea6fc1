"""Pairs of processes that watch each other, one pair for each way in which the second may end. One import, many forks.

python watch_worker.py FOLDER SECONDS PATIENCE CASE ...: each process writes what it says to FOLDER/CASE-RANK.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from loguru import logger

from velatura.core.errors import VelaturaError
from velatura.core.pulse import alive
from velatura.core.ranks import FailedElsewhere, Ranks, join
from velatura.core.watch import watched

PATIENCE = float(sys.argv[3])


def work(ranks: Ranks, case: str) -> None:
    """A few rounds together; then the second process does what the case is called."""
    for step in range(3):
        alive(f"step {step}")
        ranks.barrier()
    second = ranks.rank == 1
    if case == "slow":
        for part in range(3 if second else 0):  # longer than the patience, with signs of life
            time.sleep(PATIENCE / 2)
            alive(f"part {part}")
    elif second and case == "stands-still":
        alive("a thing that never ends")
        time.sleep(1000)
    elif second and case == "frozen":
        time.sleep(PATIENCE / 3)  # so that it has told where it is
        os.kill(os.getpid(), signal.SIGSTOP)
    elif second and case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif second and case == "message":
        raise VelaturaError("stages.x: the disk is full.")
    elif second and case == "bug":
        raise ZeroDivisionError("a mistake of ours")
    elif case == "same":
        raise VelaturaError("stages.x: all find the same.")
    dist.all_reduce(torch.zeros(1))  # as an engine waits: nothing knows that it does
    ranks.barrier()


def process(folder: Path, case: str, rank: int, port: int) -> None:
    """One process, with the ending that the command line gives it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    output = os.open(folder / f"{case}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logger.remove()
    status = 0
    try:
        ranks = join("cpu", 120.0)
        with watched(ranks, PATIENCE, folder / "logs"):
            work(ranks, case)
    except FailedElsewhere:
        status = 3
    except VelaturaError as error:
        print(f"velatura: {error}", file=sys.stderr, flush=True)
        status = 2
    except ZeroDivisionError:
        status = 1
    sys.exit(status)


def main() -> None:
    """Fork all, wait for all, and print how each ended: CASE RANK STATUS SECONDS."""
    folder, cases = Path(sys.argv[1]), sys.argv[4:]
    deadline, began, started = time.monotonic() + float(sys.argv[2]), time.monotonic(), {}
    for case in cases:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        for rank in (0, 1):
            pid = os.fork()
            if pid == 0:
                process(folder, case, rank, port)
            started[pid] = (case, rank)
    while started and time.monotonic() < deadline:
        frozen = [pid for pid, own in started.items() if own == ("frozen", 1)]
        if len(started) == len(frozen):
            break
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.1)
            continue
        print(*started.pop(pid), os.waitstatus_to_exitcode(status), round(time.monotonic() - began), flush=True)
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
