"""The table of memory in docs/models.md is what its script prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_row_of_the_memory_table_is_current() -> None:
    """One row, as all of them take minutes."""
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "docs" / "memory_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "models.md").read_text()
    assert module.HEAD in page
    assert module.row("sana") in page, "run python docs/memory_table.py and put its lines into docs/models.md"
