"""The page of common mistakes says what the corpus says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_mistakes_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_errors.py"), "--check"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0, "run python docs/generate_errors.py"
