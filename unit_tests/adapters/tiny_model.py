"""Makes the tiny model of a family, with random weights and without a download: tiny_model.py NAME FOLDER"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

FAMILIES = Path(__file__).with_name("families")


def main(given: list[str] | None = None) -> None:
    """Build one and say where it is."""
    names = sorted(path.stem for path in FAMILIES.glob("*.py") if path.stem != "parts")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write it")
    asked = parser.parse_args(given)
    sys.path.insert(0, str(FAMILIES))
    from velatura.plugins.adapters.quiet import without_bars

    with without_bars():
        print(importlib.import_module(asked.name).build(asked.folder))


if __name__ == "__main__":
    main()
