"""The command line. Each verb is a file; all of them import what is slow only once they run."""

from velatura.core.cli.program import main

__all__ = ["main"]
