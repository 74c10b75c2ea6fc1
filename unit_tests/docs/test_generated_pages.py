"""Pages and pictures that are made from the code are those that the code makes now."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from velatura.core.cli.program import VERBS
from velatura.core.contracts import CONTRACTS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("script", ["generate_api.py", "generate_errors.py", "draw_diagrams.py"])
def test_what_is_generated_is_current(script: str) -> None:
    command = [sys.executable, str(DOCS / script), "--check"]
    assert subprocess.run(command, check=False, timeout=120).returncode == 0, f"run python docs/{script}"


def test_every_contract_and_every_command_has_its_part() -> None:
    contracts, commands = (DOCS / "contracts.md").read_text(), (DOCS / "cli.md").read_text()
    for kind, contract in CONTRACTS.items():
        assert f"## {kind}\n" in contracts
        assert f"`velatura_{kind}`" in contracts
        for name in contract.__abstractmethods__:
            assert re.search(rf"^### `\w+\.{name}`", contracts, re.MULTILINE), name
    assert [verb for verb in VERBS if f"## `velatura {verb}" not in commands] == []
