"""Curves in TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from velatura.api import CheckpointSaved, Observer, Options, RunEnd, RunStart, StepEnd

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoardOptions(Options):
    """Which curves."""

    prefix: str = Field("", description="Only metrics whose name starts with this, like reward/.")


class TensorBoard(Observer[TensorBoardOptions]):
    """Every metric of every step as a curve, in the folder `tensorboard` of the stage: tensorboard --logdir runs."""

    name = "tensorboard"

    _writer: SummaryWriter | None = None

    def run_start(self, event: RunStart) -> None:
        """Open the log; after an interruption, what was logged beyond the checkpoint is hidden."""
        from torch.utils.tensorboard.writer import SummaryWriter

        purge = event.step if event.step > 0 else None
        self._writer = SummaryWriter(event.folder / "tensorboard", purge_step=purge)

    def step_end(self, event: StepEnd) -> None:
        """One point on every curve."""
        if self._writer is None:
            return
        for name, value in event.metrics.items():
            if name.startswith(self.options.prefix):
                self._writer.add_scalar(name, value, event.step)

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        """What a resumed run builds on must be on disk."""
        if self._writer is not None:
            self._writer.flush()

    def run_end(self, event: RunEnd) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
