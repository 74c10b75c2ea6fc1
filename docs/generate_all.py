"""Write every generated page and picture of the documentation: python docs/generate_all.py [--check]."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    *("generate_reference.py", "generate_api.py", "generate_errors.py", "generate_methods.py", "ablations_page.py"),
    "draw_diagrams.py",
)


def main() -> int:
    """Run them one after another; with --check, 1 when one of their files is not current."""
    status = 0
    for script in SCRIPTS:
        command = [sys.executable, str(Path(__file__).with_name(script)), *sys.argv[1:]]
        failed = subprocess.run(command, check=False).returncode
        if failed:
            print(f"not current: run python docs/{script}", file=sys.stderr)
        status |= failed
    return status


if __name__ == "__main__":
    raise SystemExit(main())
