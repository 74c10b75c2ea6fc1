"""A reward card in a real browser: nothing sticks out on a desktop or a phone, and it looks like something.

VELATURA_NO_BROWSER=1 leaves this out on a machine that can have no browser.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "unit_tests" / "cards"))

import simulated

from velatura.core.cli import main

pytestmark = pytest.mark.skipif(bool(os.environ.get("VELATURA_NO_BROWSER")), reason="VELATURA_NO_BROWSER is set")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--disable-dev-shm-usage",
    "--allow-file-access-from-files", "--virtual-time-budget=3000",
)  # fmt: skip
MEASURE = """<!doctype html><body style="margin:0"><iframe id="page" src="card.html"
 style="border:0;width:{width}px;height:3000px"></iframe><pre id="out"></pre><script>
const frame = document.getElementById("page");
frame.onload = () => setTimeout(() => {{
  const page = frame.contentDocument;
  const over = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg") &&
    e.getBoundingClientRect().right > {width} + 1).map(e => e.tagName + "." + e.className);
  document.getElementById("out").textContent = "over: [" + over + "] wide: " + page.documentElement.scrollWidth +
    " rows: " + page.querySelectorAll("#perturbations tbody tr").length + " end";
}}, 300);
</script></body>"""


def test_a_card_fits_a_desktop_and_a_phone_and_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium was found")
    monkeypatch.chdir(tmp_path)
    simulated.pairs_file(tmp_path, prompts=30, error=0.1)
    given = ["--file", "sim.py", "--label", "sim", "--ratings", "ratings.jsonl", "--bootstrap", "50", "--perturb", "8"]
    assert main(["reward-card", "sim/contrast", "noise=0.3", *given]) == 1  # too few pairs
    folder = tmp_path / "cards" / "sim"

    def visit(page: Path, *flags: str) -> str:
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    for width in (1280, 390):
        outer = folder / f"measure-{width}.html"
        outer.write_text(MEASURE.format(width=width))
        shown = visit(outer, f"--window-size={max(width, 600)},3100", "--dump-dom")
        assert f"over: [] wide: {width} rows: 13 end" in shown
    visit(folder / "card.html", f"--screenshot={tmp_path / 'card.png'}", "--window-size=1280,2400")
    pixels = np.asarray(Image.open(tmp_path / "card.png").convert("RGB")).astype(float)
    assert (np.abs(pixels.mean(axis=2) - pixels[-1, 5].mean()) > 60).mean() > 0.01
