"""From ratings to a judge to a policy trained on it, by the real command; the verifier knows how good the judge is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

RECIPE = Path(__file__).with_name("recipes") / "tiny-judge.yaml"
RUBRIC = Path(__file__).parents[1] / "recipes" / "rubrics" / "tinyworld-cleanliness.yaml"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, velatura: Run) -> Path:
    """A folder with the recipe and its finished run."""
    folder = tmp_path_factory.mktemp("judge")
    shutil.copy(RECIPE, folder)
    shutil.copy(RUBRIC, folder / "cleanliness.yaml")
    velatura("run", RECIPE.name, cwd=folder)
    return folder


def test_a_judge_learns_from_noisy_raters_what_is_true(folder: Path) -> None:
    """On pictures of prompts that it never saw; a judge that learnt nothing would be at 0 and at one half."""
    figures = json.loads((folder / "runs" / "tiny-judge" / "fit" / "validation.json").read_text())["figures"]
    own = figures["judge_and_truth"]
    assert own["spearman"] > 0.3
    assert own["pairwise"] > 0.55
    assert own["spearman"] > 2 * abs(own["spearman"] - figures["judge_and_ratings"]["spearman"])


def test_training_asks_the_judge_and_the_report_holds_it_against_the_truth(folder: Path) -> None:
    run = folder / "runs" / "tiny-judge"
    log = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert all(1 < row["reward/judged/mean"] < 5 and row["reward/judged/failed"] == 0 for row in log)
    table = pq.read_table(run / "compare" / "samples.parquet").to_pydict()
    assert all(1 <= value <= 5 for value in table["reward/judged"])
    page = (run / "report.html").read_text()
    assert "Proxy against gold" in page
    assert "judge and truth" in page


def test_a_judge_is_used_by_its_path_and_benched(folder: Path, velatura: Run) -> None:
    fitted = folder / "runs" / "tiny-judge" / "fit" / "judge"
    other = folder / "other.yaml"
    text = RECIPE.read_text().replace("{use: vlm-judge, judge: fit, name: judged}",
                                      f"{{use: vlm-judge, name: judged, with: {{path: {fitted}}}}}")  # fmt: skip
    other.write_text(text)
    velatura("check", "other.yaml", cwd=folder)
    done = velatura("rewards", "bench", "tiny-judge.yaml", "--calls", "2", cwd=folder)
    assert "judged" in done.stdout


def test_nothing_is_done_again_until_the_ratings_change(folder: Path, velatura: Run) -> None:
    again = velatura("run", RECIPE.name, cwd=folder)
    assert (again.stdout + again.stderr).count("finished before and unchanged") == 4
