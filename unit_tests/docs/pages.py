"""What the pages show: fenced blocks with the mark above them, and the commands in their shell scripts.

A mark is a comment on the line above a fence, which a reader of the site does not see:

- `<!-- runnable -->`: run as it stands, with the other runnable blocks of the page, in one folder. Then, with
  commas: `in short` (with the overrides of integration_tests/recipes/in-short.yaml), `with A=1 B=2` (with these),
  `served` (until it serves), `ends with 2` (its exit status).
- `<!-- run by integration_tests/test_some.py -->`: there.
- `<!-- parsed: reason -->`: every command is read by its own parser and none is run, because of that.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/**/*.md")]
)
SHELL = ("sh", "bash", "shell")
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
SPAN = re.compile(r"`([^`]+)`")
KEYWORDS = frozenset(
    ["if", "then", "else", "elif", "fi", "while", "until", "do", "done", "for", "in", "!", "{", "}", "[", "]"]
)
ENDS = frozenset(";&|()")
ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("text")), found["mark"] or "", found["language"], found["text"])
        for found in FENCE.finditer(text)
    ]


def shell_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in SHELL]


def commands(script: str) -> list[list[str]]:
    """The simple commands of a shell script, as words: without keywords, redirections and variables before them.

    What stands in `$(...)` within quotes is a word like another; tests of the form `[ ... ]` are left out.
    """
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if not set(word) <= ENDS:
                words.append(word)
                continue
            if simple := _simple(words):
                found.append(simple)
            words = []
    return found


def _simple(words: list[str]) -> list[str]:
    redirected = next((number for number, word in enumerate(words) if set(word) <= set("<>")), len(words))
    words = words[: redirected - (0 < redirected < len(words) and words[redirected - 1].isdecimal())]
    while words and (words[0] in KEYWORDS or ASSIGNMENT.match(words[0])):
        if words[0] == "[":
            return []
        words = words[1:]
    return words


def spans(page: Path) -> list[str]:
    """What stands between backticks in the running text, on one line each."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^<!--.*?-->$", "", text, flags=re.MULTILINE | re.DOTALL)
    paragraphs = re.split(r"\n\s*\n|\n(?=[-|*#])", text)
    return [" ".join(span.split()) for paragraph in paragraphs for span in SPAN.findall(paragraph)]
