"""Stable Diffusion 3 as people with little memory keep it, without T5, and with a shift that depends on the size."""

from __future__ import annotations

from pathlib import Path

import sd3
from sd3 import ADAPTER, EDITS, JOINED, OPTIONS, stock

__all__ = ["ADAPTER", "EDITS", "JOINED", "OPTIONS", "build", "stock"]


def build(folder: Path) -> Path:
    return sd3.build(folder, with_t5=False, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.1)
