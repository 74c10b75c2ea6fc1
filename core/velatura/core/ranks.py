"""The processes that run one recipe together, and what they tell each other outside the engine."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from velatura.core.errors import RecipeError, VelaturaError
from velatura.core.pulse import waiting

PATIENCE = timedelta(days=7)
"""How long a process waits for another in a library: the first may draw for hours alone, and `velatura.core.watch` ends
all where one is gone or stands still."""
T = TypeVar("T")
R = TypeVar("R")


class FailedElsewhere(VelaturaError):
    """Another process has said what is wrong; this one only ends."""


def world_size() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size`. What one rank reads it may read on every rank: the run folder is shared."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, shows progress, and decides."""
        return self.rank == 0

    def own(self, items: Sequence[T]) -> list[T]:
        """This rank's share: items rank, rank + size, rank + 2 size, ..."""
        return list(items[self.rank :: self.size])

    def deal(self, count: int, shares: int = 1) -> list[list[int]]:
        """Numbers of `count` items for every rank, so that of the items i, i + shares, i + 2 shares, ... each rank gets
        about as many: those go into one optimiser step, and whoever has none of them would wait."""
        block = max(1, min(shares, count // self.size))
        return [[i for i in range(count) if i // block % self.size == rank] for rank in range(self.size)]

    def gather(self, mine: T) -> list[T]:
        """What every rank gave, in rank order. Collective."""
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        with waiting():
            dist.all_gather_object(gathered, mine)
        return gathered

    def barrier(self) -> None:
        """Wait for every rank."""
        self.gather(None)

    def from_first(self, make: Callable[[], R]) -> R:
        """What `make` returns on the first rank, on every rank. Collective.

        Raises:
            VelaturaError: `make` raised it; the other ranks raise FailedElsewhere.
        """
        if self.size == 1:
            return make()
        result, failure = None, None
        if self.first:
            try:
                result = make()
            except VelaturaError as error:
                failure = error
        result, failed = self.gather((result, failure is not None))[0]
        if failure is not None:
            raise failure
        if failed:
            raise FailedElsewhere("the first process says what is wrong")
        return result  # type: ignore[return-value]

    def require(self, count: int, at: str) -> None:
        """Refuse a step that would leave a process without work.

        Raises:
            RecipeError: fewer items than processes.
        """
        if count < self.size:
            raise RecipeError(
                f"{at}: {count} a step cannot be shared by {self.size} processes. Raise it to {self.size} or more, or "
                f"start fewer processes."
            )


def join(device: str, patience: float = PATIENCE.total_seconds()) -> Ranks:
    """Meet the other processes that a launcher started; alone without a launcher.

    Raises:
        VelaturaError: not all of them came within `patience` seconds.
    """
    size = world_size()
    if size == 1:
        return Ranks()
    import torch
    import torch.distributed as dist

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_own_gpu(device))
    if not dist.is_initialized():
        store = _meet(patience)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank(), world_size=size, timeout=PATIENCE
        )
        atexit.register(leave)
    return Ranks(rank=dist.get_rank(), size=size)


def _meet(patience: float) -> Any:
    """The store that all processes share, when all have come."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, *_ = next(iter(rendezvous("env://", timeout=timedelta(seconds=patience))))
    except (dist.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise VelaturaError(
            f"process {rank()} did not meet the other processes at {where} within {patience:g} s: {reason}. Are all "
            f"{world_size()} started, and can every machine reach that address? MASTER_ADDR and MASTER_PORT change it, "
            f"engine.timeout how long to wait."
        ) from error
    store.set_timeout(PATIENCE)
    return store


def _own_gpu(device: str) -> int:
    """Number of this process's GPU on its machine.

    Raises:
        VelaturaError: there are more processes than GPUs, or the recipe gives all of them the same one.
    """
    import torch

    mine, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.startswith("cuda:"):
        raise VelaturaError(f"engine.device is '{device}', one GPU for all processes. Set it to 'cuda' or 'auto'.")
    if mine >= there:
        raise VelaturaError(
            f"process {mine} of this machine has no GPU: there are {there}. Start at most {there} processes, or set "
            f"engine.device to 'cpu'."
        )
    return mine


def leave() -> None:
    """Leave the other processes in order: gloo's threads, torn down with the interpreter, now and then abort it."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def threads_of_process(threads: int | None) -> int | None:
    """CPU threads of this process: those of its machine, shared by the machine's processes."""
    together = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"  # DeepSpeed says the latter
    return threads and max(1, threads // int(together))
