"""Two real processes and one judge: who is asked, who is told, and what is left behind when one of them fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

TINY = Path(__file__).with_name("recipes") / "tiny.yaml"
Run = Callable[..., Any]
PLUGIN = """
import os
from pathlib import Path

import torch

from velatura.api import NoOptions, Observer, Options, RewardModel, Scores, Status, hookimpl

HERE, RANK = Path(__file__).parent, os.environ.get("RANK", "0")


def note(name, line):
    with (HERE / name).open("a") as file:
        file.write(f"{line}\\n")


class ShadeOptions(Options):
    fails_in: str = "nowhere"


class Shade(RewardModel[ShadeOptions]):
    name = "shade"

    def score(self, samples):
        note(f"asked-{RANK}.txt", "golden" if samples[0].prompt.id.startswith("golden/") else "drawn")
        ok = Status.FAILED if RANK == self.options.fails_in else Status.OK
        values = torch.stack([sample.image.mean() for sample in samples])
        return Scores(values=values, status=(ok,) * len(samples), reasons=("no light in here",) * len(samples))


class Watch(Observer[NoOptions]):
    name = "watch"

    def rollout_done(self, event):
        whole, own, drawn = (len(x) for x in (event.whole.group, event.report.group, event.rollout.samples))
        note("watched.txt", f"{RANK} {whole} {own} {drawn} {len(event.whole.prompts)}")


@hookimpl
def velatura_reward():
    return [Shade]


@hookimpl
def velatura_observer():
    return [Watch]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a calibration, a curation and three steps of learning, with a golden set of two pictures."""
    folder = tmp_path_factory.mktemp("judging")
    (folder / "shade.py").write_text(PLUGIN)
    for name, level in (("dark", 20), ("light", 230)):
        Image.new("RGB", (8, 8), (level,) * 3).save(folder / f"{name}.png")
    lines = [{"image": "dark.png", "prompt": "a", "high": 0.4}, {"image": "light.png", "prompt": "a", "low": 0.6}]
    (folder / "golden.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = yaml.safe_load(TINY.read_text())
    own = recipe["stages"]
    rewards = [{"use": "shade/shade", "golden": {"file": "golden.jsonl", "every": 2}}]
    draw = {"model": "warm", "task": own["curate_t2i"]["task"], "rewards": rewards, "group_size": 4,
            "sampling": {"steps": 1, "batch": 4}}  # fmt: skip
    recipe["plugins"] = ["shade.py"]
    recipe["engine"]["kind"] = "deepspeed"
    recipe["stages"] = {
        "warm": own["warm"] | {"steps": 1},
        "weigh": draw | {"stage": "calibrate", "budgets": {"default": {"shade/shade": 1.0}}, "bootstrap": 2},
        "choose": draw | {"stage": "curate", "prompt_filter": own["curate_t2i"]["prompt_filter"]},
        "teach": {
            "stage": "rl", "init": "warm", "task": draw["task"], "rewards": rewards, "steps": 3, "prompts_per_step": 3,
            "group_size": 4, "observers": [{"use": "shade/watch"}], "sampling": {"steps": 1, "batch": 16},
            "timesteps": "all",
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def asked(folder: Path, rank: int) -> list[str]:
    return (folder / f"asked-{rank}.txt").read_text().splitlines()


def test_golden_pictures_are_asked_for_once_and_observers_see_everybodys_scores(folder: Path, velatura: Run) -> None:
    velatura("run", "recipe.yaml", cwd=folder, processes=2)
    first, second = asked(folder, 0), asked(folder, 1)
    assert "golden" not in second and second.count("drawn") > 4
    # At the start of three stages, and after two reports of four of the first process, of four, and of three.
    assert first.count("golden") == 3 + 2 + 2 + 1
    watched = [line.split() for line in (folder / "watched.txt").read_text().splitlines()]
    assert watched == [["0", "12", "8", "8", "3"]] * 3
    rows = [json.loads(line) for line in (folder / "runs/recipe/teach/metrics.jsonl").read_text().splitlines()]
    assert all(row["reward/shade/shade/golden"] == 1 for row in rows)


def test_what_only_the_second_process_knows_stands_in_the_manifest(folder: Path, tmp_path: Path, velatura: Run) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    fails = "stages.choose.rewards.0.with.fails_in='1'"
    done = velatura("run", "recipe.yaml", fails, "--stage", "choose", cwd=tmp_path / "copy", status=2, processes=2)
    said = "stages.choose.rewards.0: reward 'shade/shade' gave no score for 4 of its last 4 samples"
    assert said in done.stderr and "no light in here" in done.stderr
    assert "Traceback" not in done.stderr
    manifest = json.loads((tmp_path / "copy/runs/recipe/choose/manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert said in manifest["error"]
