"""Where a verb's log lines go."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loguru import Message
    from rich.console import Console


def say_through(console: Console) -> None:
    """Log lines go above the progress bar, plainly; warnings in colour."""
    from loguru import logger

    style = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}

    def write(message: Message) -> None:
        console.print(message.record["message"], style=style.get(message.record["level"].name), markup=False)

    logger.remove()
    logger.add(write, level="INFO", format="{message}")


def say_nothing() -> None:
    """A process beside the first shows nothing; the run gives it a log file."""
    from loguru import logger

    logger.remove()
