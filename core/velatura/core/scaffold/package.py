"""Writes a plugin package. Imports no torch: templates are read as text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from velatura.core import __version__
from velatura.core.contracts import CONTRACTS
from velatura.core.errors import VelaturaError, suggest

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

PYPROJECT = Template("""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "velatura-$name"
version = "0.1.0"
description = "$what"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["velatura$versions"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.velatura]
$name = "$module"

[tool.hatch.build.targets.wheel]
packages = ["$module"]
""")

INIT = Template('''\
"""$what."""

from velatura.api import hookimpl


$hooks
''')

HOOK = Template('''\
@hookimpl
def velatura_$kind():
    """Imported when a recipe names it."""
    return ["$component = $module.$kind:$cls"]
''')

TEST = Template('''\
"""Every component keeps the contract of its kind."""

from velatura.testing import parametrize_with_checks


@parametrize_with_checks("$name")
def test_conformance(check):
    check()
''')

README = Template("""\
# velatura-$name

$what.

```sh
pip install velatura-$name
velatura plugins list
```

| kind | in a recipe | what it is |
|---|---|---|
$rows

`velatura plugins show NAME` prints the options of each.

## Work on it

```sh
pip install --editable '.[test]'
python -m pytest
velatura plugins check $name
```
""")


def new_plugin(name: str, kinds: Sequence[str], into: Path) -> Path:
    """Write the package `velatura-NAME` with one component of each kind.

    Args:
        name: of the plugin, as recipes will say it: lower case, words joined by '-'.
        kinds: of components, like `reward`; repeated ones count once.
        into: the folder in which the package's own folder is made.

    Returns:
        The package's folder.

    Raises:
        VelaturaError: a bad name, an unknown kind, or a folder that is there already.
    """
    _refuse_bad_name(name)
    chosen = list(dict.fromkeys(kinds))
    for kind in chosen:
        if kind not in CONTRACTS:
            raise VelaturaError(f"no kind is called {kind!r}.{suggest(kind, CONTRACTS)}")
    if not into.is_dir():
        raise VelaturaError(f"there is no folder {str(into)!r} to write the package into")
    folder = into / f"velatura-{name}"
    if folder.exists():
        raise VelaturaError(f"{folder} exists. Choose another name, or another folder with --into.")
    for path, text in _contents(name, chosen).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return folder


def _refuse_bad_name(name: str) -> None:
    if not NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        hint = f" Did you mean {near!r}?" if NAME.fullmatch(near) else ""
        raise VelaturaError(f"a plugin cannot be called {name!r}: lower-case words joined by '-', like 'acme'.{hint}")
    if name.split("-")[0] == "velatura":
        raise VelaturaError(f"a plugin cannot be called {name!r}: the package is called velatura-NAME by itself")


def _contents(name: str, kinds: Sequence[str]) -> Mapping[Path, str]:
    """Path -> text of every file."""
    module = f"velatura_{name.replace('-', '_')}"
    sources = {kind: template(kind) for kind in kinds}
    components = {kind: component_in(source) for kind, source in sources.items()}
    hooks = "\n\n".join(
        HOOK.substitute(kind=kind, component=component, module=module, cls=cls)
        for kind, (cls, component, _) in components.items()
    )
    rows = "\n".join(f"| {kind} | `{name}/{component}` | {line} |" for kind, (_, component, line) in components.items())
    words = {
        "name": name, "module": module, "versions": _compatible(__version__), "hooks": hooks.strip(), "rows": rows,
        "what": f"Components for Velatura: {', '.join(kinds)}",
    }  # fmt: skip
    texts = {
        "pyproject.toml": PYPROJECT.substitute(words),
        "README.md": README.substitute(words),
        f"{module}/__init__.py": INIT.substitute(words),
        f"tests/test_{name.replace('-', '_')}.py": TEST.substitute(words),
        ".gitignore": "__pycache__/\n.pytest_cache/\ndist/\n.venv/\n",
        **{f"{module}/{kind}.py": source for kind, source in sources.items()},
    }
    return {Path(path): text for path, text in texts.items()}


def template(kind: str) -> str:
    """The source of one kind's component, as it is written."""
    return (files("velatura.core.scaffold") / "kinds" / f"{kind}.py").read_text(encoding="utf-8")


def component_in(source: str) -> tuple[str, str, str]:
    """(class, name in recipes, first line of its documentation) of the component that a template defines."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "name":
                    return node.name, ast.literal_eval(line.value), (ast.get_docstring(node) or "").partition("\n")[0]
    raise ValueError("the template defines no component")


def _compatible(version: str) -> str:
    """`>=0.1,<0.2` for 0.1.0: a minor release may deprecate, the next one may remove."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}"
