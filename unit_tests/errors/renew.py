"""Write the messages of corpus.yaml again, after what there is has changed: python unit_tests/errors/renew.py

Read the difference before you commit it: a message that got worse is a bug. Then run docs/generate_errors.py.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from test_corpus import CORPUS, HERE, changed, checked

from velatura.core.errors import VelaturaError

HEAD = """\
# Recipes with one mistake each, and what is said of it. The test makes every change to recipe.yaml and compares;
# docs/errors.md is made of this file by docs/generate_errors.py. `plugin`: a file mine.py beside the recipe.
# After a change of what there is (a component, a kind of stage): python unit_tests/errors/renew.py
"""


class Written(yaml.SafeDumper):
    """Texts of several lines as blocks, other texts in one line."""


def text(dumper: Written, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


Written.add_representer(str, text)


def answered() -> Iterator[dict[str, str]]:
    """The cases with what is said now."""
    for case in CORPUS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                checked(changed(case), case)
            except VelaturaError as error:
                yield {**case, "message": str(error).replace(f"{Path.cwd()}/", "")}
            else:
                raise SystemExit(f"this is no mistake any more: {case['mistake']}")
            finally:
                os.chdir(HERE)


def main() -> None:
    parts = [HEAD]
    for section, cases in groupby(answered(), key=lambda case: case["section"]):
        dumped = yaml.dump(list(cases), Dumper=Written, sort_keys=False, width=10_000, allow_unicode=True)
        parts.append(f"# {section}\n{dumped}")
    (HERE / "corpus.yaml").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
