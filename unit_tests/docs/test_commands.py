"""Every command that the documentation shows is run, or at least read by the parser of what it calls."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, ROOT, Block, blocks, commands, shell_blocks, spans

from velatura.core.ablation.settings import load_ablation
from velatura.core.build import open_registry, resolve_options
from velatura.core.cli import program
from velatura.core.errors import VelaturaError
from velatura.core.recipe import load_recipe
from velatura.core.shipped import find_recipe

RUNNABLE = re.compile(r"runnable(, (in short|served|ends with \d|with \S.*))*")
BUILTINS = frozenset(["cd", "source", "export", "exit", "trap", "wait", "kill", "eval", ":", "#", "#!/bin/bash"])
ELSEWHERE = frozenset(["vllm", "ssh", "curl", "openssl", "scontrol", "tensorboard", "pre-commit"])
"""Programs that are not ours and not installed where the tests run."""
FIRST_LINE = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


SHOWN = [block for page in PAGES for block in shell_blocks(page)]


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in SHOWN])
def test_every_block_says_how_it_is_tested(block: Block) -> None:
    """A mark with a reason, a test that names the page, or `runnable`, for which test_runnable_docs.py looks."""
    if block.mark.startswith("run by "):
        test = ROOT / block.mark.removeprefix("run by ")
        assert test.is_file()
        folder = block.page.relative_to(ROOT).parts[0]
        assert (folder if folder == "examples" else block.page.name) in test.read_text(), test
    elif block.mark.startswith("parsed: "):
        assert len(block.mark) > len("parsed: why")
    else:
        assert RUNNABLE.fullmatch(block.mark), f"{block.name} has no mark; CONTRIBUTING.md says which there are"
        assert block.page.parent in (ROOT, ROOT / "docs"), "test_runnable_docs.py looks there"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_other_blocks_hold_no_commands(page: Path) -> None:
    hidden = [
        f"{block.name}: {line}"
        for block in blocks(page)
        if block.language in ("", "text", "console")
        for line in block.text.splitlines()
        if re.match(rf"(\$ )?({'|'.join((*ELSEWHERE, *READERS))}) ", line)
    ]
    assert not hidden, "make it a block of sh"


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in SHOWN])
def test_every_command_is_read_by_its_own_parser(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    for other in blocks(block.page):
        if found := FIRST_LINE.match(other.text):
            (tmp_path / found[1]).write_text(other.text)
    found = commands(block.text)
    assert found
    for words in found:
        read(words, block, tmp_path)


def read(words: list[str], block: Block, shown: Path) -> None:
    """Fail unless it is a command that there is, with arguments that it takes."""
    while words[0] == "srun":  # starts what follows its options
        words = words[next(n for n, word in enumerate(words) if n and not word.startswith("-")) :]
    first = Path(words[0]).name
    if first in BUILTINS:
        return
    if first in ELSEWHERE:
        assert block.mark.startswith(("parsed: ", "run by ")), f"{first} is not here, so it cannot be run"
        return
    assert first in READERS, f"{words}: nobody knows how to read this command"
    READERS[first](words[1:], block, shown)


def read_velatura(words: list[str], block: Block, shown: Path) -> None:
    """Options exist; a recipe exists or the page shows it, and takes its overrides."""
    parsed = parse_velatura(words)
    named = getattr(parsed, "recipe", None) or getattr(parsed, "subject", None) or getattr(parsed, "served", None)
    overrides = getattr(parsed, "overrides", [])
    if any("=" in word and word in overrides for word in words if word.startswith("-")):
        pytest.fail(f"{words}: an option among the overrides")
    if named is not None and (Path(named).suffix == ".yaml" or hasattr(parsed, "recipe")):
        resolve(Path(named), overrides, block, shown)
    for file in getattr(parsed, "files", []):
        if "=" not in file:
            load_ablation(Path(file))


def parse_velatura(words: Sequence[str]) -> argparse.Namespace:
    """As the command does it, with nothing left over."""
    parsed, rest = program._parser().parse_known_args(list(words))
    wrong = [word for word in rest if "=" not in word or word.startswith("-") or not hasattr(parsed, "overrides")]
    assert not wrong, f"velatura {' '.join(words)} does not take {wrong}"
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def resolve(named: Path, overrides: list[str], block: Block, shown: Path) -> None:
    """Load the recipe with its overrides, unless what the page shows is a mistake or needs a package of its own."""
    path = next((path for path in (find_recipe(named), shown / named.name) if path.exists()), None)
    assert path is not None, f"{block.name}: there is no recipe {named}, and the page shows none of that name"
    if "ends with 2" in block.mark or block.mark.startswith("run by "):
        return
    recipe = load_recipe(path, overrides)
    resolve_options(open_registry(recipe), recipe)


class Parsed(BaseException):
    """A script has read its arguments; nothing of what it does is wanted."""


def read_python(words: list[str], block: Block, shown: Path) -> None:
    """`-c` compiles, a script of ours reads its arguments, a module is one that we use."""
    if words[0] == "-c":
        compile(words[1], block.name, "exec")
    elif words[0] == "-m":
        assert words[1] in ("pytest", "build", "twine", "venv", "pip"), words
    elif words[0].startswith("runs/"):
        assert RUNNABLE.fullmatch(block.mark), f"{words[0]} is there only when the page is run"
    else:
        assert (ROOT / words[0]).is_file(), words[0]
        if len(words) > 1 and "add_argument" in (ROOT / words[0]).read_text():
            read_arguments(words)


def read_arguments(words: list[str]) -> None:
    """Run a script up to the moment in which it has read them."""

    def stop(self: argparse.ArgumentParser, *arguments: object, **options: object) -> None:
        original(self, *arguments, **options)
        raise Parsed

    original: Callable[..., object] = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [words[0], *words[1:]])
        patch.syspath_prepend(str(ROOT / Path(words[0]).parent))
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def read_make(words: list[str], block: Block, shown: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(words) <= set(targets), words


def read_pip(words: list[str], block: Block, shown: Path) -> None:
    """Requirements are some; an extra of ours is declared, and a folder that is named is there."""
    assert words[0] == "install", words
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    for word in words[1:]:
        if word.startswith("./"):
            assert (ROOT / word / "pyproject.toml").is_file(), word
        elif not word.startswith(("-", ".")):
            asked = Requirement(word)
            assert asked.name != "velatura" or asked.extras <= set(extras), word


READERS: dict[str, Callable[[list[str], Block, Path], None]] = {
    "velatura": read_velatura, "python": read_python, "python3": read_python, "make": read_make, "pip": read_pip,
}  # fmt: skip
SPOKEN = [
    pytest.param(span, page, id=f"{name_of(page)}: {span}")
    for page in PAGES
    for span in dict.fromkeys(spans(page))
    if re.match(rf"(srun )?({'|'.join(READERS)}) [\w.-]", span)
]


@pytest.mark.parametrize(("span", "page"), SPOKEN)
def test_every_command_in_the_text_exists(span: str, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verb and options of `velatura run RECIPE --fresh`, whose arguments stand for some; others are read."""
    monkeypatch.chdir(ROOT)
    for command in commands(span):
        words = command[command[0] == "srun" :]
        if words[0] == "velatura":
            look(words[1:])
        else:
            read(words, Block(page, 0, "parsed: in the text", "sh", span), ROOT)


def look(words: list[str]) -> None:
    """Fail unless the words begin with a command, and it has each option among them."""
    parser: argparse.ArgumentParser = program._parser()
    while below := [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]:
        if not words or words[0] in ("COMMAND", "--help", "--version", "..."):
            return
        assert words[0] in below[0].choices, words
        parser, words = below[0].choices[words[0]], words[1:]
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    assert set(options) <= set(parser._option_string_actions), words
    recipe, overrides = words[:1], [word for word in words[1:] if "=" in word]
    if recipe and recipe[0].endswith(".yaml"):
        assert find_recipe(Path(recipe[0])).exists(), recipe
    assert not overrides or any(action.dest in ("overrides", "options") for action in parser._actions), words


def test_the_overrides_that_shorten_a_recipe_are_of_recipes_that_pages_run() -> None:
    listed = yaml.safe_load((ROOT / "integration_tests" / "recipes" / "in-short.yaml").read_text())
    run = {word for block in SHOWN if "in short" in block.mark for words in commands(block.text) for word in words}
    for recipe, overrides in listed.items():
        assert recipe in run
        if (ROOT / recipe).exists():
            read_velatura(["run", recipe, *overrides], Block(ROOT / "README.md", 0, "", "sh", ""), ROOT)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("velatura run a.yaml b=1   # why", [["velatura", "run", "a.yaml", "b=1"]]),
        ("A=1 srun -n 2 make test && cd x; exit 1", [["srun", "-n", "2", "make", "test"], ["cd", "x"], ["exit", "1"]]),
        ("velatura schema > recipe.json 2>/dev/null", [["velatura", "schema"]]),
        ("velatura run a.yaml \\\n  --fresh &", [["velatura", "run", "a.yaml", "--fresh"]]),
        ("if [ $status -eq 75 ]; then scontrol requeue 1; fi", [["scontrol", "requeue", "1"]]),
        ('velatura sample run "a fox; red" | head', [["velatura", "sample", "run", "a fox; red"], ["head"]]),
    ],
)
def test_scripts_are_taken_apart_as_a_shell_does(line: str, found: list[list[str]]) -> None:
    assert commands(line) == found


@pytest.mark.parametrize(
    "line",
    ["velatura runn recipes/tinyworld.yaml", "velatura run recipes/tinyworld.yaml --fres",
     "velatura run recipes/none.yaml", "velatura run recipes/tinyworld.yaml stages.student.stepz=3",
     "velatura plugins list --sort name", "make tea",
     "python benchmarks/rl_step.py --no-such-option", "pip install velatura[nothing]", "rm -r runs", "curl http://x",
     "velatura ablate recipes/ablations/none.yaml"],
)  # fmt: skip
def test_what_does_not_exist_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, VelaturaError)):
        for words in commands(line):
            read(words, Block(ROOT / "README.md", 0, "runnable", "sh", line), tmp_path)
