"""Start the same command in several processes of this machine, with torch's launcher."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from velatura.core.errors import VelaturaError
from velatura.core.interruption import LAUNCHER
from velatura.core.passing_on import passing_on

LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher")


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `velatura ARGUMENTS` in `processes` processes and return the exit status of the first that failed, or 0.

    When one ends badly the others are ended too. SIGTERM, and the first SIGINT, are passed on as requests to stop.

    Raises:
        VelaturaError: a process was killed by a signal; its number and the signal are named.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, start_method="spawn",
        logs_specs=DefaultLogsSpecs(), signals_to_handle="SIGHUP,SIGQUIT",
    )  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[LAUNCHER] = "1"
    command = [sys.executable, "-m", "velatura.core.cli", *arguments]
    try:
        with _quietly(), passing_on():
            elastic_launch(config, entrypoint=command[0])(*command[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise VelaturaError(
                f"process {rank} was killed by {failure.signal_name()}; the others were ended. The same command goes "
                f"on from the last checkpoint."
            ) from None
        return int(failure.exitcode)
    except SignalException as error:
        raise VelaturaError(
            f"ended by {error.sigval.name}, and so were its processes. The same command goes on from the last "
            f"checkpoint."
        ) from None
    return 0


@contextmanager
def _quietly() -> Iterator[None]:
    """The launcher reports failures with tracebacks of its own; the processes say themselves what is wrong."""
    import logging

    names = [name for name in logging.root.manager.loggerDict if name.startswith(LOGGERS)]  # each has its own level
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
