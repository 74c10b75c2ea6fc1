from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORTIONS = ("core", "plugins", "rewards", "schedulers")
FILE_LINES, FUNCTION_LINES = 400, 50
LIGHT = (
    *("components", "contracts", "hookspecs", "errors", "explain", "settings", "source", "graph", "recipe"),
    *("base_settings", "reward_settings", "calibrate_settings", "judge_settings", "kinds"),
    *("registry", "plugin", "describe", "build"),
)


def sources() -> list[Path]:
    """Every source file of the package."""
    return sorted(path for portion in PORTIONS for path in (ROOT / portion / "velatura").rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Names of modules imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("portion", PORTIONS)
def test_velatura_is_a_namespace(portion: str) -> None:
    """An __init__.py directly in a velatura/ folder would hide the other three."""
    assert (ROOT / portion / "velatura").is_dir()
    assert not (ROOT / portion / "velatura" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["api", "core", "plugins", "rewards", "schedulers"])
def test_every_portion_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"velatura.{name}").__doc__


def test_every_package_is_typed() -> None:
    folders = [folder for portion in PORTIONS for folder in (ROOT / portion / "velatura").iterdir()]
    packages = [folder for folder in folders if (folder / "__init__.py").exists()]
    assert [str(package) for package in packages if not (package / "py.typed").exists()] == []


def test_the_core_imports_no_implementation() -> None:
    """The contracts of pyproject.toml, checked by import-linter."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "NO_COLOR": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def users_of(library: str) -> set[str]:
    """Files that import a library, anywhere in them."""
    return {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name.split(".")[0] == library for name in imported(parsed(path)))
    }


def test_only_one_file_imports_deepspeed() -> None:
    assert users_of("deepspeed") <= {"core/velatura/core/engine/deepspeed.py"}


def test_nothing_imports_torchvision() -> None:
    assert users_of("torchvision") == set()


def test_imports_are_absolute_and_named() -> None:
    found = []
    for path in sources():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.level > 0 or node.names[0].name == "*"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_files_and_functions_stay_small() -> None:
    found = []
    for path in sources():
        where = path.relative_to(ROOT)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            found.append(f"{where}: {lines} lines, at most {FILE_LINES}")
        for node in ast.walk(parsed(path)):
            found += [f"{where}:{getattr(node, 'lineno', 1)}: {complaint}" for complaint in oversized(node)]
    assert found == [], "split by idea:\n" + "\n".join(found)


def oversized(node: ast.AST) -> Iterator[str]:
    """What is too large about a function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{node.name} has {length} lines, at most {FUNCTION_LINES}"


def test_no_exception_is_swallowed() -> None:
    """A handler for everything that only passes hides the cause of what follows."""
    found = []
    for path in sources():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler) and catches_all(node) and all(map(is_silent, node.body)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def catches_all(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    return caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException"))


def is_silent(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass | ast.Continue) or (isinstance(node, ast.Return) and node.value is None)


def test_there_is_no_torch_at_the_top_of_light_modules() -> None:
    for name in LIGHT:
        tree = parsed(ROOT / "core" / "velatura" / "core" / f"{name}.py")
        top = [
            module for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for module in imported(node)
        ]
        assert not {"torch", "numpy", "velatura.core.types"} & set(top), name
