"""Where and with what a run was made."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from velatura.core import __version__

LIBRARIES = ("torch", "diffusers", "deepspeed", "transformers", "numpy", "scipy")


def environment(base: Path) -> dict[str, Any]:
    """Where and with what this runs."""
    git = None
    if shutil.which("git"):
        asked = ["git", "-C", str(base), "describe", "--always", "--dirty"]
        git = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "velatura": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "git": git or None,
        **{name: version(name) for name in LIBRARIES},
    }
