"""The time grids of stock schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """The logarithm mu of the time shift for a picture of `tokens` tokens: linear between two configured sizes."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - least) / (high - low)
    return float(tokens * slope + (least - slope * low))
