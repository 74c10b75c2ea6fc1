"""The table of families in docs/models.md is what the adapters are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from velatura.core.registry import Registry
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions
from velatura.plugins.adapters.model_folder import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ROWS = {
    cells[0].strip("` "): cells
    for line in PAGE.read_text().partition("## Families")[2].partition("**How far")[0].splitlines()
    if line.startswith("| `") and (cells := [cell.strip() for cell in line.strip("|").split(" | ")])
}


def adapters() -> dict[str, type[DiffusersAdapter]]:
    registry = Registry.discover()
    names = [info.name for info in registry.list() if info.kind == "adapter" and info.distribution == "velatura"]
    found = {name: registry.get("adapter", name) for name in names}
    return {name: kind for name, kind in found.items() if issubclass(kind, DiffusersAdapter)}


@pytest.mark.parametrize("name", sorted(adapters()))
def test_a_family_has_a_row_with_its_pipelines_and_its_own_options(name: str) -> None:
    kind, row = adapters()[name], ROWS[name]
    own = kind.options_class.model_fields.keys() - DiffusersOptions.model_fields.keys()
    assert set(re.findall(r"`(\w+)`", row[5])) == own
    if kind.pipelines:
        assert tuple(re.findall(r"`(\w+)`", row[1])) == kind.pipelines == FAMILIES[name]
