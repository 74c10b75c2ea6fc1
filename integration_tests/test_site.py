"""The documentation as a site: it builds without a warning, every link leads somewhere, and it fits any screen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
SEEN = ("index", "tutorial", "recipes", "errors", "contracts", "explanation", "ablations", "rewards", "project/index")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--allow-file-access-from-files",
    "--virtual-time-budget=8000",
)  # fmt: skip
MEASURE = """<!doctype html><body style="margin:0">{frames}<pre id="out"></pre><script>
const inside = e => e.closest("pre, table, .md-typeset__scrollwrap, " +
  ".md-search, .md-sidebar, .md-tabs, .md-header, .md-top, svg, .highlight") ||
  getComputedStyle(e.parentElement).overflowX === "auto";
function measured(frame) {{
  const page = frame.contentDocument, heading = page.querySelector("h1");
  return {{
    wide: page.documentElement.scrollWidth,
    broken: [...page.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    over: [...page.querySelectorAll("article *")].filter(e => !inside(e) &&
      e.getBoundingClientRect().right > {width} + 1).map(e => e.tagName + " " + e.textContent.slice(0, 40)).slice(0, 5),
    heading: heading ? heading.getBoundingClientRect().height : 0,
    menu: getComputedStyle(page.querySelector(".md-tabs")).display,
  }};
}}
window.onload = () => setTimeout(() => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    try {{ found[frame.id] = measured(frame); }} catch (error) {{ found[frame.id] = {{error: String(error)}}; }}
  }}
  document.getElementById("out").textContent = JSON.stringify(found);
}}, 500);
</script></body>"""
FRAME = '<iframe id="{name}" src="{name}.html" style="border:0;width:{width}px;height:1200px"></iframe>'


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Page(HTMLParser):
    """Links, sources and ids of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := given.get(key))}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        source = given.get("src") if tag in ("img", "script") else given.get("href") if tag == "link" else None
        if source:
            self.sources.append(source)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_of_the_four_parts_is_there(site: Path) -> None:
    for name in ("tutorial", "first-reward", "publish", "how-to", "recipes", "contracts", "cli", "metrics", "errors",
                 "explanation", "papers", "project/index", "project/CONTRIBUTING"):  # fmt: skip
        assert (site / f"{name}.html").is_file(), name


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    wrong = []
    for path, page in pages.items():
        for link in [*page.links, *page.sources]:
            target, _, anchor = link.partition("#")
            if re.match(r"https?:|mailto:|data:", link):
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            known = pages.get(file)
            if not file.is_file():
                wrong.append(f"{path.relative_to(site)}: {link} is not there")
            elif anchor and known and unquote(anchor) not in known.ids and anchor != "__skip":
                wrong.append(f"{path.relative_to(site)}: {link} has no such place")
    assert wrong == []


def test_nothing_is_fetched_from_a_network(pages: dict[Path, Page]) -> None:
    assert {source for page in pages.values() for source in page.sources if re.match(r"(https?:)?//", source)} == set()


def test_words_are_found_by_the_search(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    text = " ".join(entry["text"] for entry in index["docs"])
    for words in ("no such option. Did you mean", "velatura_reward", "likelihood ratio"):
        assert words in re.sub(r"&#?\w+;|<[^>]+>", "", text), words


@pytest.fixture(scope="module")
def browser() -> str:
    if os.environ.get("VELATURA_NO_BROWSER"):
        pytest.skip("VELATURA_NO_BROWSER is set")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        message = "No Chromium was found; to try the site in one: apt-get update && apt-get install -y chromium"
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_a_desktop_and_a_phone(width: int, browser: str, site: Path, tmp_path: Path) -> None:
    """One start of the browser looks at all pages, one after another."""
    outer = site / f"measure-{width}.html"
    frames = "".join(FRAME.format(name=name, width=width) for name in SEEN)
    outer.write_text(MEASURE.format(frames=frames, width=width))
    flags = (*FLAGS, f"--user-data-dir={tmp_path}", f"--window-size={max(width, 600)},1600", "--dump-dom")
    done = subprocess.run(
        [browser, *flags, outer.as_uri()], capture_output=True, text=True, timeout=280, check=True
    )  # fmt: skip
    outer.unlink()
    shown = re.search(r'<pre id="out">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert shown, "the pages did not load"
    found = json.loads(shown[1])
    assert set(found) == set(SEEN)
    for name, page in found.items():
        assert "error" not in page, (name, page)
        assert page["wide"] <= width, name
        assert page["broken"] == [], name
        assert page["over"] == [], name
        assert page["heading"] > 20, name
        assert (page["menu"] == "none") == (width < 600), name
