"""The first line of a class's documentation, read without importing what it is in."""

from __future__ import annotations

import ast
import sys
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path


def summary_of(target: type | str) -> tuple[str, str]:
    """(first docstring line, problem) of a class or of `package.module:Class`."""
    if isinstance(target, type):
        return _first_line(vars(target).get("__doc__")), ""
    module, _, attribute = target.partition(":")
    path = source_file(module)
    if path is None:
        return "", f"there is no module {module}"
    try:
        names = _names(path)
    except SyntaxError as error:
        return "", f"{module} is not valid Python: {error}"
    known = attribute in names or "*" in names or path.suffix != ".py"
    return _first_line(names.get(attribute)), "" if known else f"{module} has no {attribute!r}"


def _first_line(docstring: str | None) -> str:
    """The first line that says something."""
    return docstring.strip().partition("\n")[0].strip() if docstring else ""


def source_file(module: str) -> Path | None:
    """The file of a module, found the way `import` finds it but without running any package on the way."""
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for depth in range(len(parts)):
        where = spec.submodule_search_locations if spec is not None else None
        if depth and where is None:
            return None
        spec = _spec(".".join(parts[: depth + 1]), list(where) if where is not None else None)
        if spec is None:
            return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _spec(name: str, where: list[str] | None) -> ModuleSpec | None:
    """What the first finder that knows it says of a module."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, where)
        if spec is not None:
            return spec
    return None


@lru_cache(maxsize=256)
def _names(path: Path) -> dict[str, str | None]:
    """What a source file defines or imports at its top, classes with their docstrings."""
    if path.suffix != ".py":
        return {}
    names: dict[str, str | None] = {}
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = ast.get_docstring(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name: None for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            names["*"] = None  # what is defined there depends on the machine
    return names
