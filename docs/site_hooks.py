"""What makes a site of the pages: links to files of the repository lead to pages that show them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FRAGMENT = re.compile(r"(?<=^```)(yaml\n|python\n)# fragment\n")
"""What tells the tests that a block is a part of a file; readers see that."""
LANGUAGES = {".yaml": "yaml", ".py": "python", ".toml": "toml", ".jsonl": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside of docs/ that a page links to, and for those that these link to."""
    made: set[str] = set()
    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in outside(page):
            name = page_of(target)
            if name in made or not target.exists():
                continue
            made.add(name)
            files.append(File.generated(config, name, content=shown(target)))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links seen from the repository into links seen from the site, and leave out what only tests read."""
    here = page.file.src_uri
    origin = origin_of(here)

    def seen(match: re.Match[str]) -> str:
        target = (origin.parent / match[1]).resolve()
        inside = target.is_relative_to(ROOT / "docs")
        name = target.relative_to(ROOT / "docs").as_posix() if inside else page_of(target)
        return posixpath.relpath(name, posixpath.dirname(here) or ".") + (match[2] or "")

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(FRAGMENT.sub(r"\1", part) if part.startswith("```") else LINK.sub(seen, part) for part in parts)


def outside(page: Path) -> Iterator[Path]:
    """Files outside of docs/ that a page links to."""
    if page.suffix != ".md":
        return
    for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target = (page.parent / match[1]).resolve()
        if target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs"):
            yield target


def page_of(target: Path) -> str:
    """The site's page that shows a file of the repository."""
    name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else target.name
    return f"project/{name}" if name.endswith(".md") else f"project/{name}.md"


def origin_of(page: str) -> Path:
    """The file that a page of the site was made of."""
    if not page.startswith("project/"):
        return ROOT / "docs" / page
    name = page.removeprefix("project/")
    return ROOT / name if (ROOT / name).exists() else ROOT / name.removesuffix(".md")


def shown(target: Path) -> str:
    """A page as it is; any other text as a block; the files of a folder."""
    if target.is_dir():
        files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
        listed = "\n".join(f"- `{file}`" for file in files if "__pycache__" not in file)
        return f"# {target.relative_to(ROOT).as_posix()}\n\n{listed}\n"
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return text
    language = LANGUAGES.get(target.suffix, "text")
    return f"# {target.relative_to(ROOT).as_posix()}\n\n```{language}\n{text.rstrip()}\n```\n"
