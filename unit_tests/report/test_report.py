"""`report.html`: self-contained, honest about what is missing, and made from files alone."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from velatura.core.errors import VelaturaError
from velatura.core.report import build_report
from velatura.core.report.charts import line_chart, moving_average, nice_ticks, number

VOID = {"meta", "img", "br", "link", "input", "hr", "source"}


class Page(HTMLParser):
    """Addresses, tags and text of a page; fails on tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Page:
    return Page(build_report(run_folder))


@pytest.fixture
def unfinished(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "unfinished"))


def test_nothing_is_fetched_and_nothing_is_executed(page: Page, run_folder: Path):
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", (run_folder / "report.html").read_text(), re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_links_inside_the_page_lead_somewhere(page: Page):
    inside = [address[1:] for address in page.addresses if address.startswith("#")]
    assert inside
    assert set(inside) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_every_part_of_a_finished_run_is_there(page: Page):
    for part in ("raises alignment on t2i", "keeps", "By category", "The same prompts and seeds under every model",
                 "Where student gained most over base", "How the models learned", "prompts kept",
                 "alignment: failed", "2.13.0", "every default filled in", "exported to", "Gradient norm",
                 "Distance to the teachers", "a comment with <angle brackets> & an ampersand"):  # fmt: skip
        assert part in page.text, part
    assert "What is missing" not in page.text


def test_the_page_holds_pictures_of_every_model_and_the_sources(page: Page):
    pictures = [address for address in page.addresses if address.startswith("data:image/png")]
    assert len(pictures) > 100
    assert page.text.count("source") > 12


def test_building_twice_changes_nothing_but_the_time(run_folder: Path):
    def without_time() -> str:
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", build_report(run_folder).read_text())

    assert without_time() == without_time()


def test_a_run_that_stopped_in_training_says_what_is_missing(unfinished: Path):
    for name in ("student", "compare", "export"):
        shutil.rmtree(unfinished / name)
    path = unfinished / "teacher_edit" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"status": "failed", "error": "reward 'ocr' failed 9 times"}))
    log = unfinished / "teacher_edit" / "metrics.jsonl"
    log.write_text(log.read_text()[:-30])
    text = Page(build_report(unfinished)).text
    assert "Stage teacher_edit failed: reward 'ocr' failed 9 times." in text
    assert "Stage student has not run." in text
    assert "No evaluation has run yet" in text
    assert "teacher_edit/metrics.jsonl: 1 unreadable line left out." in text
    assert "How the models learned" in text


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("resolved.json", "resolved.json cannot be read"),
        ("compare/summary.json", "compare/summary.json cannot be read"),
        ("compare/samples.parquet", "samples.parquet cannot be read"),
        ("compare/images/student/t2i.npz", "student/t2i.npz cannot be read"),
        ("curate_t2i/ledger.parquet", "curate_t2i/ledger.parquet cannot be read"),
        ("teacher_t2i/pictures/step-000060.png", "teacher_t2i/pictures/step-000060.png cannot be read"),
        ("teacher_t2i/manifest.json", "teacher_t2i/manifest.json cannot be read"),
    ],
)
def test_a_broken_file_costs_its_own_part_only(unfinished: Path, broken: str, said: str):
    path = unfinished / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = Page(build_report(unfinished)).text
    assert said in text
    assert "How it was made" in text


def test_missing_pictures_and_evaluation_without_summary_are_named(unfinished: Path):
    shutil.rmtree(unfinished / "compare" / "images" / "base")
    text = Page(build_report(unfinished)).text
    assert "images/base/t2i.npz is missing" in text
    (unfinished / "compare" / "summary.json").unlink()
    assert "compare/summary.json is missing" in Page(build_report(unfinished)).text


def test_the_recipe_alone_is_enough_for_a_page(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("stages: {}\n")
    assert "No evaluation has run yet" in Page(build_report(tmp_path)).text


def test_text_of_prompts_is_never_markup(unfinished: Path):
    path = unfinished / "teacher_t2i" / "pictures" / "captions.json"
    path.write_text(json.dumps({"step-000060.png": "after 60 steps: <script>alert(1)</script>"}))
    made = Page(build_report(unfinished))
    assert "script" not in made.tags
    assert "<script>alert(1)</script>" in made.text


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(VelaturaError, match="holds no run"):
        build_report(tmp_path)
    with pytest.raises(VelaturaError, match="is not a folder"):
        build_report(tmp_path / "nowhere")


def test_ticks_are_round_and_inside():
    assert nice_ticks(0.13, 0.92, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert nice_ticks(0, 59, 5) == [0, 20, 40]
    assert nice_ticks(3, 3, 4) == [3]


def test_numbers_of_ticks_are_short():
    assert [number(x) for x in (0.25, 20.0, -0.5, 0.0, 2e-5)] == ["0.25", "20", "\N{MINUS SIGN}0.5", "0",
                                                                  "2e\N{MINUS SIGN}5"]  # fmt: skip


def test_a_moving_average_keeps_a_straight_line():
    assert moving_average([1.0, 2, 3, 4, 5, 6], 3) == [1, 2, 3, 4, 5, 6]


def test_a_flat_line_and_a_single_point_can_be_drawn():
    assert "polyline" in line_chart({"x": [(0, 1.0), (1, 1.0)]}, label="x")
    assert "circle" in line_chart({"x": [(0, 0.0)]}, label="x")
    assert not line_chart({"x": []}, label="x")
