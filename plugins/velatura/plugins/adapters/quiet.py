"""Without what stock libraries print while they load and save."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TORCHVISION = "requires torchvision (not installed)"
"""Begins what transformers says of every image processor: pictures are prepared without it here."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Neither progress bars, of which every part of a model has one, nor what is said of torchvision; warnings are."""
    from diffusers.utils import logging as stock
    from transformers.utils import logging as encoders

    logger = logging.getLogger("transformers.utils.import_utils")
    before = [each for each in (stock, encoders) if each.is_progress_bar_enabled()]
    for each in before:
        each.disable_progress_bar()
    logger.addFilter(_matters)
    try:
        yield
    finally:
        logger.removeFilter(_matters)
        for each in before:
            each.enable_progress_bar()


def _matters(record: logging.LogRecord) -> bool:
    return TORCHVISION not in record.getMessage()
