"""Write docs/errors.md from the corpus of wrong recipes in the tests: python docs/generate_errors.py [--check]."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from difflib import unified_diff
from itertools import groupby
from pathlib import Path

import yaml

PAGE = Path(__file__).with_name("errors.md")
ERRORS = Path(__file__).parents[1] / "unit_tests" / "errors"
HEAD = """\
# Common mistakes, and what is said of them

<!-- Written by docs/generate_errors.py from unit_tests/errors/corpus.yaml; change that, then run it again. -->

A mistake in a recipe is reported before anything runs: the file and the line, the path within the recipe, what stands
there, what there is instead, and what to do. `velatura check RECIPE` looks for all of these and runs nothing. An option
that has a line of its own is named with that line.

Below is every mistake that the tests try, {count} of them, with the exact answer. Each changes a few lines of one
recipe, [unit_tests/errors/recipe.yaml](../unit_tests/errors/recipe.yaml): a line with `-` is as it was, one with `+`
has the mistake. Look for the words of your message with your browser's search.
"""


def page() -> str:
    """The whole page."""
    corpus = yaml.safe_load((ERRORS / "corpus.yaml").read_text(encoding="utf-8"))
    parts = [HEAD.format(count=len(corpus))]
    for section, cases in groupby(corpus, key=lambda case: case["section"]):
        parts.append(f"## {section}\n")
        for case in cases:
            parts += entry(case)
    return "\n".join(parts)


def entry(case: Mapping[str, str]) -> Iterator[str]:
    """One mistake: what was written, and the answer."""
    mistake = case["mistake"]
    yield f"### {mistake[0].upper()}{mistake[1:]}\n"
    yield from fence("diff", written(case["old"], case["new"]))
    if "plugin" in case:
        yield "with this `mine.py`, named under `plugins`:\n"
        yield from fence("py", case["plugin"])
    yield from fence("console", f"velatura: {case['message']}")


def written(old: str, new: str) -> str:
    """The lines of the recipe that change: as they were, and with the mistake."""
    recipe = (ERRORS / "recipe.yaml").read_text(encoding="utf-8")
    before, after = recipe.splitlines(), recipe.replace(old, new, 1).splitlines()
    return "\n".join(line for line in unified_diff(before, after, n=0) if not line.startswith(("---", "+++", "@@")))


def fence(language: str, text: str) -> Iterator[str]:
    """A block."""
    yield f"```{language}\n{text.rstrip()}\n```\n"


def main() -> int:
    """Write the page, or say whether it is current."""
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
