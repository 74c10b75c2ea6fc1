"""The stages `rate` and `judge-fit`: recipes that cannot work, and runs that go on where they were cut off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from velatura.api import Loss, Rated
from velatura.core.build import open_registry, resolve_options
from velatura.core.cli import main
from velatura.core.errors import RecipeError, VelaturaError
from velatura.core.kept_batches import read_parts
from velatura.core.kept_pictures import pictures_of
from velatura.core.pipeline import run_pipeline
from velatura.core.recipe import load_recipe
from velatura.core.replay import replay
from velatura.core.reward_settings import RewardRef
from velatura.core.stages.judge_fit import parts_of
from velatura.rewards.judge.vlm import Vlm

FRESH = {"width": 32, "vision_width": 32, "layers": 1, "vision_layers": 1, "patch": 4}
RATER = {"use": "tinyworld-rater", "dimension": "looks", "with": {"looks_at": "cleanliness"}}


def stages(**changes: dict) -> dict:
    task = {"use": "tinyworld", "with": {"task": "t2i", "count": 24}}
    made = {
        "rate": {
            "stage": "rate", "task": task, "group_size": 3, "mismatched": 0.5, "sampling": {"steps": 1, "batch": 24},
            "raters": [RATER, {**RATER, "with": {"looks_at": "cleanliness", "seed": 1}}],
            "truth": [{"use": "tinyworld-aesthetics", "dimension": "looks"}],
        },
        "fit": {
            "stage": "judge-fit", "rated": "rate", "dimension": "looks", "steps": 9, "batch": 6, "micro_batch": 4,
            "validate_every": 2, "checkpoint_every": 3, "keep_checkpoints": 9, "bootstrap": 20,
            "optimizer": {"lr": 3e-3, "warmup": 2, "schedule": "linear"},
            "judge_model": {"use": "vlm", "with": {"rubric": "aesthetics", "min_mass": 0.0, "fresh": FRESH}},
        },
    }  # fmt: skip
    return {name: {**stage, **changes.get(name, {})} for name, stage in made.items()}


def written(folder: Path, own: dict, engine: str = "local") -> Path:
    path = folder / "recipe.yaml"
    top = {
        "seed": 1, "adapter": "tinyworld", "guidance": "none", "output": str(folder / "run"),
        "engine": {"kind": engine, "threads": 1, "device": "cpu"}, "stages": own,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(top))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and its finished run."""
    folder = tmp_path_factory.mktemp("fit")
    run_pipeline(written(folder, stages()))
    return folder


def test_rating_writes_what_a_judge_is_fitted_to(finished: Path) -> None:
    rows = [json.loads(text) for text in (finished / "run" / "rate" / "ratings.jsonl").read_text().splitlines()]
    assert len(rows) == 24 * 3
    assert {row["dimension"] for row in rows} == {"looks"}
    assert all(len(row["ratings"]) == 2 and set(row["ratings"]) <= {1, 2, 3, 4, 5} for row in rows)
    assert all((finished / "run" / "rate" / row["image"]).is_file() for row in rows)
    own = [row for row in rows if row["image"].startswith("images/000000-0000")]
    assert 0 <= own[0]["truth"] <= 1
    by_picture: dict[str, set[str]] = {}
    for row in rows:  # a group of three in a row: without mismatches, 24 groups of one prompt each
        by_picture.setdefault(str(rows.index(row) // 3), set()).add(row["prompt"])
    mixed = sum(len(prompts) > 1 for prompts in by_picture.values())
    assert mixed >= 12  # .5 of the pictures have another prompt: a group stays whole with probability about .14


def test_the_judge_says_what_it_was_fitted_to_and_how_it_did(finished: Path) -> None:
    fit = finished / "run" / "fit"
    facts = json.loads((fit / "judge" / "judge.json").read_text())
    assert (facts["dimension"], facts["rubric_name"], facts["stage"]) == ("looks", "aesthetics", "fit")
    assert set(facts["splits"]) == {"train", "calibration", "test"}
    figures = facts["figures"]
    assert {"judge_and_ratings", "judge_and_truth", "one_rater_and_truth", "leave_one_rater_out"} <= set(figures)
    assert figures["judge_and_truth"]["pictures"] == figures["pictures"] > 0
    assert figures["one_rater_and_truth"]["spearman"] > 0.2  # noise of half a level
    log = [json.loads(text) for text in (fit / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] + 1 for row in log if "calibration/quality" in row] == [2, 4, 6, 8, 9]


def test_a_run_that_was_cut_off_ends_in_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """From step 3 of 9; and the best step, which may lie before, is remembered."""
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    fit = again / "run" / "fit"
    for step in (6, 9):
        shutil.rmtree(fit / "checkpoints" / f"step-{step:06d}")
    shutil.rmtree(fit / "judge")
    (fit / "weights.safetensors").unlink()
    manifest = json.loads((fit / "manifest.json").read_text())
    (fit / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    run_pipeline(again / "recipe.yaml", [f"output={again / 'run'}"], remember=False)
    for name in ("weights.safetensors", "judge/model.safetensors", "checkpoints/step-000009/set-best.safetensors"):
        before, after = (load_file(folder / "run" / "fit" / name) for folder in (finished, again))
        assert before.keys() == after.keys()
        assert all(before[key].equal(after[key]) for key in before), name
    assert json.loads((fit / "validation.json").read_text()) == json.loads(
        (finished / "run" / "fit" / "validation.json").read_text()
    )


def test_an_update_that_is_not_finite_is_skipped_kept_and_can_be_replayed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the second step on no loss of the picture that stands first there is finite."""
    victims, calls, original = [], [], Vlm.loss

    def loss(model: Vlm, net: Any, rated: Sequence[Rated]) -> Loss:
        found = original(model, net, rated)
        calls.append(len(rated))
        if len(calls) == 3:
            victims.append(rated[0])
        if any(torch.equal(row.sample.image, one.sample.image) for row in rated for one in victims):
            return replace(found, value=found.value * torch.nan)
        return found

    monkeypatch.setattr(Vlm, "loss", loss)
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    changes = [f"output={again / 'run'}", "stages.fit.steps=3", "stages.fit.validate_every=3"]
    run_pipeline(again / "recipe.yaml", changes, remember=False)
    fit = again / "run" / "fit"
    log = [json.loads(text) for text in (fit / "metrics.jsonl").read_text().splitlines()]
    assert [row["updated"] for row in log] == [1, 0, 1]
    assert [row["skipped"] for row in log] == [0, 1, 0]
    (kept,) = (fit / "nonfinite").iterdir()
    assert kept.name == "step-000001-update-0"
    assert main(["replay", str(kept)]) == 1
    said = capsys.readouterr().out
    assert "stage 'fit', step 1, update 0: the loss of micro-batch 0 of process 0 is nan" in said
    (batch,) = replay(kept).batches
    assert "lm_head.weight" in batch.parameters
    row = victims[0]
    told = f"picture 0 (of {row.sample.prompt.text!r}, rated {row.mean:g}): loss"
    assert told in batch.points and told in said
    (part,) = read_parts(kept, pictures_of).batches
    assert part.rated[0].ratings == row.ratings and part.rated[0].sample.prompt.id == row.sample.prompt.id
    monkeypatch.setattr(Vlm, "loss", original)
    assert replay(kept).finite


def test_a_step_that_marks_more_pictures_is_better_than_one_that_marks_fewer(finished: Path, tmp_path: Path) -> None:
    """A minimum that a network this young cannot reach: no step is usable, and the share that it marks decides."""
    with pytest.raises(VelaturaError, match="has not learnt to answer with a level yet"):
        run_pipeline(finished / "recipe.yaml", [
            f"output={tmp_path / 'run'}", "stages.fit.judge_model.with.min_mass=0.9", "stages.fit.steps=4",
        ])  # fmt: skip
    log = (tmp_path / "run" / "fit" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text).get("calibration/quality") for text in log] == [None, -2.0, None, -2.0]


@pytest.mark.parametrize(
    ("prompts", "size", "processes", "parts"),
    [
        ("aabbccdd", 8, 1, ["aabbccdd"]),
        ("aabbccdd", 8, 2, ["aabb", "ccdd"]),
        ("aabbccdd", 8, 3, ["aa", "bbcc", "dd"]),
        ("aabbccdd", 3, 2, ["aab", "bcc", "dd"]),
        ("aaaaaaaa", 4, 3, ["aaaa", "aaaa"]),
        ("aab", 8, 4, ["aa", "b"]),
    ],
)
def test_a_step_of_one_micro_batch_is_shared_and_prompts_stay_whole(prompts, size, processes, parts) -> None:
    rated = [SimpleNamespace(sample=SimpleNamespace(prompt=SimpleNamespace(id=name))) for name in prompts]
    made = parts_of(rated, size, processes)
    assert ["".join(row.sample.prompt.id for row in part) for part in made] == parts


def test_deepspeed_learns_what_plain_torch_learns(finished: Path, tmp_path: Path) -> None:
    path = written(tmp_path, stages(), engine="deepspeed")
    run_pipeline(path)
    losses = [
        [json.loads(text)["loss"] for text in (folder / "run" / "fit" / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished, tmp_path)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": {"rated": "rates"}}, "no stage is called 'rates'. Did you mean 'rate'"),
        ({"fit": {"ratings": "r.jsonl"}}, "give 'ratings' .* or 'rated'"),
        ({"fit": {"train_share": 0.9, "calibration_share": 0.1}}, "each split needs a share"),
        ({"fit": {"judge_model": "vml"}}, "no judge_model is called 'vml'. Did you mean 'vlm'"),
        ({"rate": {"truth": [RATER, RATER]}}, "'truth' has dimension 'looks' twice"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_anything_runs(tmp_path, changes, message) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe = load_recipe(written(tmp_path, stages(**changes)))
        resolve_options(open_registry(recipe), recipe)


def rl(**reward: object) -> dict:
    own = {"use": "vlm-judge", **reward}
    task = {"use": "tinyworld", "with": {"task": "t2i", "count": 8}}
    return {"rl": {"stage": "rl", "task": task, "rewards": [own]}}


def test_a_reward_that_asks_a_judge_waits_for_its_stage(tmp_path) -> None:
    recipe = load_recipe(written(tmp_path, rl(judge="fit") | stages()))
    assert recipe.order() == ["rate", "fit", "rl"]
    resolved = resolve_options(open_registry(recipe), recipe)
    assert resolved["stages"]["rl"]["rewards"][0]["with"]["path"] == "fit/judge"
    assert recipe.stages["rl"].rewards[0].opened(Path("/runs/a")).with_ == {"path": "/runs/a/fit/judge"}
    assert RewardRef(use="x").opened(Path("/runs/a")) == RewardRef(use="x")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"judge": "rate"}, "stage 'rate' is of kind rate; a fine-tuned judge comes from a stage of kind judge-fit"),
        ({"judge": "fit", "with": {"path": "x"}}, "'judge' is stage 'fit', and 'path' names a judge, too"),
        ({"use": "tinyworld-aesthetics", "judge": "fit"}, "no such option"),
    ],
)
def test_a_reward_that_cannot_ask_a_judge_is_refused(tmp_path, reward, message) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe = load_recipe(written(tmp_path, rl(**reward) | stages()))
        resolve_options(open_registry(recipe), recipe)


def test_too_few_prompts_for_three_splits_is_said(tmp_path) -> None:
    one = {"task": {"use": "tinyworld", "with": {"task": "t2i", "count": 1}}, "mismatched": 0.0}
    with pytest.raises(VelaturaError, match="are of 1 prompt clusters, which gives a split no picture"):
        run_pipeline(written(tmp_path, stages(rate=one)))
