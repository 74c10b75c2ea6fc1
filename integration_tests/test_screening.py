"""Curation with noise, a second look and a later stage, and the ledger that training keeps, by the whole command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

Run = Callable[..., Any]
REWARD = """
import random
draw = random.Random(0)

def shade(image, prompt):
    return float(image.mean()) + (draw.gauss(0, 0.0005) if "red" not in prompt.text else 0.0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, velatura: Run) -> Path:
    folder = tmp_path_factory.mktemp("screening")
    (folder / "shade.py").write_text(REWARD)
    recipe = yaml.safe_load((Path(__file__).parent / "recipes" / "tiny.yaml").read_text())
    rewards = [{"use": "function", "name": "shade", "with": {"file": "./shade.py", "call": "shade"}}]
    task = recipe["stages"]["curate_t2i"]["task"]
    curate = {"stage": "curate", "model": "warm", "task": task, "rewards": rewards, "group_size": 4}
    recipe["stages"] = {
        "warm": recipe["stages"]["warm"],
        "first": curate | {"repeats": 2, "confirm": True, "prompt_filter": {"use": "range", "with": {"quantile": 0.5}}},
        "later": curate | {"after": "first", "prompt_filter": {"use": "range", "with": {"noise": {"shade": 1e-9}}}},
        "teach": {
            "stage": "rl", "prompts": "later", "rewards": rewards, "steps": 2, "prompts_per_step": 2, "group_size": 6,
            "prompt_filter": {"use": "range", "with": {"quantile": None, "noise": {"shade": 100.0}}},
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    velatura("run", path, cwd=folder)
    return folder / "runs" / "recipe"


def ledger(folder: Path, stage: str, name: str = "ledger.parquet") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / stage / name).to_pylist()
    return rows


def result(folder: Path, stage: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / stage / "manifest.json").read_text())["result"]
    return made


def test_borderline_prompts_are_sampled_again_and_say_so(folder: Path) -> None:
    rows, said = ledger(folder, "first"), result(folder, "first")
    second = [row for row in rows if "two looks" in row["reason"] or "second look" in row["reason"]]
    assert said["confirmed"] == len(second) > 0
    assert all(row["state"] in ("active", "flat", "noisy", "failed") and row["threshold"] > 0 for row in rows)
    assert sum(sum(states.values()) for states in said["states_by_category"].values()) == len(rows) == 8
    asked = said["failures_by_category"]["shade"]
    assert sum(count["asked"] for count in asked.values()) == 4 * (8 + len(second))


def test_a_later_stage_screens_what_slept_and_leaves_the_rest(folder: Path) -> None:
    first = {row["prompt_id"]: row for row in ledger(folder, "first")}
    later = {row["prompt_id"]: row for row in ledger(folder, "later")}
    assert first.keys() == later.keys()
    slept = {name for name, row in first.items() if row["state"] == "flat"}
    assert slept
    assert all(later[name] == row for name, row in first.items() if name not in slept)
    assert all(later[name]["range"] != first[name]["range"] for name in slept)
    kept = json.loads((folder / "later" / "kept.json").read_text())["prompt_ids"]
    assert set(kept) == {name for name, row in later.items() if row["keep"]}
    assert {name for name, row in first.items() if row["keep"]} <= set(kept)


def test_groups_that_are_only_noise_teach_nothing_and_are_written_down(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "teach" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["filter/dropped"] == line["filter/flat"] == 1 and line["rows/gradient"] == 0 for line in lines)
    rows = ledger(folder, "teach", "prompts.parquet")
    seen = [row for row in rows if row["seen"]]
    assert seen
    assert all("which noise alone reaches" in row["reason"] and row["mean_range"] > 0 for row in seen)
    assert result(folder, "teach")["relative_change"] == 0
    shares = {key: value for key, value in lines[0].items() if "/failure_rate/" in key}
    assert shares
    assert set(shares.values()) == {0.0}
