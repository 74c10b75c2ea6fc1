"""What the documentation marks as runnable is run as it stands, page by page, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNNABLE = re.compile(r"^<!-- runnable -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```(?:python|yaml)\n# ([\w-]+\.(?:py|yaml))\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted(ROOT.glob("docs/*.md")) if RUNNABLE.search(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """Files that the page shows are written first: blocks that begin with their name."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    command = bin_folder / "velatura"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m velatura.core.cli "$@"\n')
    command.chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    text = page.read_text()
    for name, body in FILE.findall(text):
        (here / name).write_text(body)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    script = "".join(RUNNABLE.findall(text))
    done = subprocess.run(
        ["bash", "-eux", "-c", script],
        cwd=here,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_tutorials_are_among_them() -> None:
    assert {page.name for page in PAGES} >= {"first-reward.md", "publish.md"}


def test_the_mistake_of_the_tutorial_is_answered_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from velatura.core.build import open_registry, resolve_options
    from velatura.core.errors import RecipeError
    from velatura.core.recipe import load_recipe

    text = (ROOT / "docs" / "first-reward.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, body in FILE.findall(text):
        Path(name).write_text(f"# {name}\n{body}")
    (said,) = re.findall(r"^```console\nvelatura: (.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    recipe = load_recipe("warmer.yaml", ["stages.warmer.rewards.1.with={gian: 2.0}"])
    with pytest.raises(RecipeError) as caught:
        resolve_options(open_registry(recipe), recipe)
    assert str(caught.value) == said
