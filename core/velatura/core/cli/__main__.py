"""`python -m velatura.core.cli`: what a launcher starts in every process."""

from __future__ import annotations

from velatura.core.cli.program import main

if __name__ == "__main__":
    raise SystemExit(main(launched=True))
