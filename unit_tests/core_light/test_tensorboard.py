from __future__ import annotations

import time
from pathlib import Path

from velatura.api import CheckpointSaved, RunEnd, RunStart, StepEnd
from velatura.plugins.observers.tensorboard import TensorBoard, TensorBoardOptions


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def watch(folder: Path, begin: int, end: int, prefix: str = "") -> None:
    """A stage as an observer sees it."""
    observer = TensorBoard(TensorBoardOptions(prefix=prefix))
    observer.run_start(RunStart(stage="teacher", kind="rl", folder=folder, step=begin, total=end))
    for step in range(begin, end):
        observer.step_end(StepEnd(step=step, metrics={"reward/mean": step / 2, "loss": 1.0}))
    observer.checkpoint_saved(CheckpointSaved(step=end, folder=folder))
    observer.run_end(RunEnd(step=end))


def test_metrics_become_curves(tmp_path: Path) -> None:
    watch(tmp_path, 0, 2)
    assert curves(tmp_path) == {"reward/mean": [(0, 0.0), (1, 0.5)], "loss": [(0, 1.0), (1, 1.0)]}


def test_only_some_metrics(tmp_path: Path) -> None:
    watch(tmp_path, 0, 1, prefix="reward/")
    assert set(curves(tmp_path)) == {"reward/mean"}


def test_what_lay_beyond_the_checkpoint_is_hidden_after_a_resume(tmp_path: Path) -> None:
    watch(tmp_path, 0, 4)
    time.sleep(1.1)  # TensorBoard reads files in the order of their seconds
    watch(tmp_path, 2, 3)
    assert [step for step, _ in curves(tmp_path)["loss"]] == [0, 1, 2]


def test_events_without_a_start_do_nothing() -> None:
    observer = TensorBoard()
    observer.step_end(StepEnd(step=0, metrics={"loss": 1.0}))
    observer.run_end(RunEnd(step=0))
