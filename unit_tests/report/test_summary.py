"""`summary.json`: the numbers of an evaluation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from velatura.core.errors import VelaturaError
from velatura.core.report import summarise, summary_table
from velatura.core.report.wording import sentences


@pytest.fixture(scope="module")
def summary(run_folder: Path) -> dict:
    return json.loads((run_folder / "compare" / "summary.json").read_text())


def write(folder: Path, rows: list[dict]) -> Path:
    defaults = {"route": "t2i", "category": "single", "text": "x", "seed": 0}
    pq.write_table(pa.Table.from_pylist([{**defaults, **row} for row in rows]), folder / "samples.parquet")
    return folder


def test_means_and_differences_are_those_of_the_table(run_folder: Path, summary: dict):
    table = pq.read_table(run_folder / "compare" / "samples.parquet").to_pylist()
    mean = {
        model: np.mean([r["gold/alignment"] for r in table if r["route"] == "t2i" and r["model"] == model])
        for model in ("base", "student")
    }
    cell = summary["routes"]["t2i"]["models"]["student"]["gold/alignment"]["overall"]
    assert cell["mean"] == pytest.approx(mean["student"], abs=1e-5)
    assert cell["difference"] == pytest.approx(mean["student"] - mean["base"], abs=1e-5)
    assert cell["low"] < cell["difference"] < cell["high"]
    assert cell["n_pairs"] == 30


def test_a_planted_gain_is_found_and_an_absent_one_is_not(summary: dict):
    own = summary["routes"]["t2i"]["models"]["teacher_t2i"]
    assert own["gold/alignment"]["overall"]["low"] > 0
    assert own["gold/alignment"]["overall"]["p_holm"] < 0.01
    assert own["gold/cleanliness"]["overall"]["low"] < 0 < own["gold/cleanliness"]["overall"]["high"]


def test_holm_covers_the_gold_metrics_of_all_models_and_nothing_else(summary: dict):
    route = summary["routes"]["edit"]
    cells = [route["models"][m][name]["overall"] for m in ("teacher_edit", "student") for name in route["headline"]]
    assert all(name.startswith("gold/") for name in route["headline"])
    assert max(cell["p_holm"] / cell["p"] for cell in cells) == pytest.approx(len(cells))
    assert route["models"]["student"]["reward/alignment"]["overall"]["p_holm"] is None
    assert route["models"]["student"]["gold/alignment"]["categories"]["hair"]["p_holm"] is None


def test_a_metric_counts_only_the_prompts_it_applies_to(summary: dict):
    cell = summary["routes"]["t2i"]["models"]["student"]["gold/identity"]["overall"]
    assert (cell["n_pairs"], cell["missing"]) == (6, 96)  # one category of five


def test_the_student_is_held_against_its_own_teacher(summary: dict):
    kept = summary["routes"]["edit"]["retained"]["student"]
    assert kept["teacher"] == "teacher_edit"
    share = kept["metrics"]["gold/alignment"]
    assert share["is_meaningful"]
    assert share["low"] < share["ratio"] < share["high"]
    assert 0.6 < share["ratio"] < 1.5  # planted: 1.05
    assert not kept["metrics"]["gold/cleanliness"]["is_meaningful"]


def test_the_short_form_names_the_primary_metric(summary: dict):
    assert summary["headline"]["t2i"]["metric"] == "gold/alignment"
    assert set(summary["headline"]["t2i"]["models"]) == {"base", "teacher_t2i", "student"}


def test_only_shared_prompts_and_seeds_are_compared(tmp_path: Path):
    rows = [{"model": "base", "prompt_id": p, "gold/a": 0.0} for p in ("1", "2", "3")]
    rows += [{"model": "new", "prompt_id": p, "gold/a": float(p)} for p in ("2", "3", "4")]
    cell = summarise(write(tmp_path, rows), "base", bootstrap=50, seed=0)["routes"]["t2i"]["models"]["new"]["gold/a"]
    assert (cell["overall"]["n_pairs"], cell["overall"]["difference"]) == (2, 2.5)
    assert cell["overall"]["mean"] == 3.0


def test_a_model_that_was_never_paired_has_no_difference(tmp_path: Path):
    rows = [{"model": "base", "prompt_id": "1", "gold/a": 1.0}, {"model": "new", "prompt_id": "2", "gold/a": 1.0}]
    cell = summarise(write(tmp_path, rows), "base", bootstrap=50, seed=0)["routes"]["t2i"]["models"]["new"]["gold/a"]
    assert cell["overall"]["difference"] is None
    assert cell["overall"]["p"] is None


def test_an_unknown_baseline_is_answered_with_the_nearest(run_folder: Path):
    with pytest.raises(VelaturaError, match=r"baseline 'bas' was not evaluated\. Did you mean 'base'"):
        summarise(run_folder / "compare", "bas", bootstrap=50, seed=0)


def test_a_truncated_table_is_named(tmp_path: Path):
    (tmp_path / "samples.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(VelaturaError, match=r"samples\.parquet cannot be read"):
        summarise(tmp_path, "base", bootstrap=50, seed=0)


def test_nothing_is_claimed_when_nothing_was_gained(synthetic: ModuleType, tmp_path: Path):
    folder = synthetic.make_evaluation(tmp_path / "compare", prompts=20, gain=0.0, seed=3)
    said = sentences(summarise(folder, "base", bootstrap=300, seed=0))
    primary = [s for s in said if s.subject == "primary"]
    assert {s.tone for s in primary} == {"open"}
    assert all("not settled" in s.text for s in primary)
    assert all("cannot be said" in s.text for s in said if s.subject == "share")


def test_a_loss_is_called_a_loss_and_hacking_is_pointed_at(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = [
        {"model": model, "prompt_id": str(i), "gold/a": sign * 0.2 + rng.normal(0, 0.05), "reward/b": -sign + 0.0}
        for model, sign in (("base", 0), ("hacked", -1))
        for i in range(20)
    ]
    said = sentences(summarise(write(tmp_path, rows), "base", bootstrap=300, seed=0))
    assert [s.tone for s in said if s.subject == "primary"] == ["bad"]
    assert any("reward hacking in hacked: b (reward) went up while a went down" in s.text for s in said)


def test_the_table_fits_a_hundred_columns(summary: dict):
    out = io.StringIO()
    Console(file=out, width=100).print(summary_table(summary))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "teacher_edit" in text
    assert "…" not in text
    assert "keeps" in text
