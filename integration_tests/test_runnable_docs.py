"""What the documentation marks as runnable is run, page by page, in a folder of its own.

A mark says in which way: see unit_tests/docs/pages.py. Blocks of Python and YAML that begin with a file's name are
those files. Folders of the source tree that commands name are there; so is what a page takes for granted (`GIVEN`).
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
for folder in ("docs", "judge", "cards"):
    sys.path.insert(0, str(ROOT / "unit_tests" / folder))
sys.path.insert(0, str(Path(__file__).parent))
from chat_server import ChatServer  # noqa: E402
from page_shell import PageShell  # noqa: E402
from pages import PAGES, Block, blocks, shell_blocks  # noqa: E402
from simulated import pairs_file  # noqa: E402

SHORT = yaml.safe_load((Path(__file__).parent / "recipes" / "in-short.yaml").read_text())
FILE = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")
TREES = ("recipes", "examples", "benchmarks", "unit_tests")
SHOWN = [page for page in PAGES if any(block.mark.startswith("runnable") for block in shell_blocks(page))]
GIVEN: dict[str, Callable[[Path], object]] = {
    "ratings.jsonl": lambda here: pairs_file(here, prompts=4, error=0.1),
    "redness.py": lambda here: write_files(here, ROOT / "docs" / "rewards.md"),
    "warmth.py": lambda here: write_files(here, ROOT / "docs" / "first-reward.md"),
}
"""Files that a reader has when a command names them, and what writes them into a folder."""


@pytest.fixture(scope="module")
def shell(forks) -> Iterator[PageShell]:  # type: ignore[no-untyped-def]
    with PageShell(forks) as opened:
        yield opened


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, shell: PageShell) -> None:
    script = "".join(shown(block) for block in shell_blocks(page) if block.mark.startswith("runnable"))
    write_what_is_there(tmp_path, page, script)
    with ChatServer() as judge:
        variables = {"JUDGE": judge.address, "JUDGE_KEY": "k", "REWARD_TOKEN": "t", "COLUMNS": "160"}
        said = shell.run(script, tmp_path, variables, seconds=900)
    assert "Traceback" not in said, said


def shown(block: Block) -> str:
    """The script of a block, as its mark wants it run."""
    asked = block.mark.split(", ")
    status = next((words.split()[-1] for words in asked if words.startswith("ends with ")), None)
    more = " ".join(words.removeprefix("with ") for words in asked if words.startswith("with "))
    lines = []
    for line in block.text.splitlines():
        command, comment, said = line.partition("  # ")
        found = re.match(r"velatura run (\S+)", command)
        overrides = " ".join(SHORT[found[1]]) if found and "in short" in asked else ""
        command = " ".join(part for part in (command.rstrip(), overrides, more) if part)
        lines.append(f"{'served ' if 'served' in asked and command else ''}{command}{comment}{said}\n")
    text = "".join(lines)
    return text if status is None else f"ended=0\n( {text} ) || ended=$?\ntest $ended = {status}\n"


def write_what_is_there(here: Path, page: Path, script: str) -> None:
    """Write what the page shows, and what it takes for granted."""
    for tree in TREES:
        if f"{tree}/" in script:
            shutil.copytree(ROOT / tree, here / tree, ignore=shutil.ignore_patterns("__pycache__"))
    for name, write in GIVEN.items():
        if name in script:
            write(here)
    write_files(here, page)


def write_files(here: Path, page: Path) -> None:
    """The files that a page shows."""
    for block in blocks(page):
        if found := FILE.match(block.text):
            (here / found[1]).write_text(block.text)


def test_the_tutorials_are_among_them() -> None:
    assert {page.name for page in SHOWN} >= {"tutorial.md", "first-reward.md", "publish.md", "models.md", "cli.md"}


def test_a_mark_changes_only_what_it_says() -> None:
    block = Block(
        ROOT / "a.md", 1, "runnable, in short", "sh", "velatura run warmer.yaml  # why\nvelatura plugins list\n"
    )
    first, second = shown(block).splitlines()
    assert first == f"velatura run warmer.yaml {' '.join(SHORT['warmer.yaml'])}  # why"
    assert second == "velatura plugins list"
    with_more = Block(ROOT / "a.md", 1, "runnable, served, with --port 0", "sh", "velatura serve-reward brisque\n")
    assert shown(with_more) == "served velatura serve-reward brisque --port 0\n"


@pytest.mark.parametrize(
    ("text", "mark"), [("velatura plugins show no-such-thing\n", "runnable"), ("true\n", "runnable, ends with 2")]
)
def test_a_command_that_does_not_do_as_it_says_fails(text: str, mark: str, tmp_path: Path, shell: PageShell) -> None:
    with pytest.raises(AssertionError, match="ended with"):
        shell.run(shown(Block(ROOT / "a.md", 1, mark, "sh", text)), tmp_path, {}, seconds=300)


def test_the_mistake_of_the_tutorial_is_answered_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from velatura.core.build import open_registry, resolve_options
    from velatura.core.errors import RecipeError
    from velatura.core.recipe import load_recipe

    page = ROOT / "docs" / "first-reward.md"
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, page)
    (said,) = re.findall(r"^```console\nvelatura: (.*?)\n```$", page.read_text(), re.MULTILINE | re.DOTALL)
    recipe = load_recipe("warmer.yaml", ["stages.warmer.rewards.1.with={gian: 2.0}"])
    with pytest.raises(RecipeError) as caught:
        resolve_options(open_registry(recipe), recipe)
    assert str(caught.value) == said
