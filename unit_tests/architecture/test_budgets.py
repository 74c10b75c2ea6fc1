"""How large it may become, and what the first command may cost. A test that fails here asks: is it worth that?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PORTIONS = ("core", "plugins", "rewards", "schedulers")
MEGABYTES = 18.0
"""Of everything that the wheel has, not packed; most of it are weights of the embedded world and of faces."""
CODE_LINES, DEPENDENCIES = 50_000, 22
HELP_SECONDS, HELP_MODULES = 0.5, 450
"""CPU seconds of `velatura --help` with the start of Python, and modules that it may import."""
PROBE = """
import sys, time, json
from velatura.core.cli import main
main(["--help"])
print(json.dumps([time.process_time(), len(sys.modules), "torch" in sys.modules]), file=sys.stderr)
"""


def shipped() -> list[Path]:
    folders = [ROOT / portion / "velatura" for portion in PORTIONS]
    files = [path for folder in (*folders, ROOT / "recipes") for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts]


def test_the_package_stays_small() -> None:
    size = sum(path.stat().st_size for path in shipped()) / 1e6
    assert size < MEGABYTES, f"{size:.1f} MB are shipped"
    lines = sum(len(path.read_text().splitlines()) for path in shipped() if path.suffix == ".py")
    assert lines < CODE_LINES, f"{lines} lines of Python are shipped"


def test_few_packages_are_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) <= DEPENDENCIES


def test_the_first_command_is_quick_and_light() -> None:
    """The best of three: other processes disturb caches."""
    answers = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, timeout=120)
        answers.append(json.loads(done.stderr.splitlines()[-1]))
        if answers[-1][0] < HELP_SECONDS:
            break
    seconds, modules, torch = min(answers)
    assert not torch
    assert modules < HELP_MODULES, f"{modules} modules are imported to print a help"
    assert seconds < HELP_SECONDS


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.name)
def test_issue_templates_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name != "config.yml":
        assert {"name", "description", "body"} <= set(form)
        assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_hooks_before_a_commit_are_tools_of_the_makefile() -> None:
    """What they start is installed by `make test`, and each script is there."""
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
             for hook in repo["hooks"]]  # fmt: skip
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f"$(RUN)/{tool}" in makefile, hook["id"]
        for script in re.findall(r"\S+\.py", hook["entry"]):
            assert (ROOT / script).is_file()


def test_the_makefile_has_what_contributing_names() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"lint", "test", "docs", "bench", "downstream"} <= named <= targets
