"""The stage from a recipe to weights that another stage trains with, on the embedded world."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from loguru import logger
from PIL import Image

from velatura.core.check import check_combinations
from velatura.core.errors import CheckpointError, RecipeError
from velatura.core.pipeline import plan_run, run_pipeline
from velatura.core.report import build_report
from velatura.core.stages import calibrate
from velatura.core.weight_ledger import read_calibration

RECIPE = """\
seed: 5
plugins: [noisy.py]
engine: {kind: local, threads: 1, device: cpu}
adapter: {use: tinyworld, with: {weights: null, width: 48, heads: 3, layers: 2}}
task: {use: tinyworld, with: {task: t2i, count: 24, eval_count: 4, categories: [portrait, single]}}
sampling: {steps: 2, batch: 32}
guidance: none
rewards:
  - {use: noisy/brightness, name: bright, with: {noise: 0.01}}
  - {use: tinyworld-sharpness, name: sharp}
stages:
  weights:
    stage: calibrate
    guards: [{use: tinyworld-aesthetics, name: clean}]
    budgets: {portrait: {bright: 0.3, sharp: 0.7}, default: {bright: 0.5, sharp: 0.5}}
    group_size: 4
    kappa: -1.0
    prior_groups: 10.0
    bootstrap: 20
  teacher:
    stage: rl
    weights_from: weights
    advantage: reliability-z
    timesteps: {use: high-noise, with: {count: 1}}
    steps: 4
    prompts_per_step: 4
    group_size: 4
    keep_checkpoints: 9
    pictures_every: 4
"""
STAGE = "stages.weights"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its plugin."""
    made = tmp_path_factory.mktemp("calibration")
    (made / "small.yaml").write_text(RECIPE)
    shutil.copy(Path(__file__).with_name("noisy.py"), made / "noisy.py")
    return made


Start = Callable[..., Path]


@pytest.fixture(scope="session")
def start(folder: Path) -> Start:
    """Runs stages of the recipe in a folder of their own."""

    def run(name: str, *overrides: str, only: str | None = None) -> Path:
        return run_pipeline(folder / "small.yaml", [f"output={folder / name}", *overrides], only=only)

    return run


@pytest.fixture(scope="session")
def done(start: Start) -> Path:
    """The finished run of the recipe as it is."""
    return start("done")


def ledger(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = pq.read_table(run / "weights" / "weight_ledger.parquet").to_pylist()
    return {(row["category"], row["reward"]): row for row in rows}


def test_shares_are_budgets_and_the_ledger_says_why(done: Path) -> None:
    rows = ledger(done)
    assert set(rows) == {(c, r) for c in ("portrait", "single") for r in ("bright", "sharp", "clean")}
    for category, budget in (("portrait", 0.3), ("single", 0.5)):
        own = rows[category, "bright"]
        assert own["budget"] == budget
        assert own["share"] == pytest.approx(budget, abs=1e-4)
        assert own["weight"] + rows[category, "sharp"]["weight"] == pytest.approx(1)
        assert own["weight_error"] >= 0 and own["policy"] == "base" and own["policy_step"] == 0
        assert rows[category, "clean"]["role"] == "guard" and rows[category, "clean"]["weight"] == 0
        assert "budget as written" in own["reason"]
        assert -1 <= rows[category, "clean"]["correlation"] <= 1


def test_the_noise_is_what_was_put_in(done: Path) -> None:
    rows = ledger(done)
    for category in ("portrait", "single"):
        assert rows[category, "bright"]["noise"] == pytest.approx(0.01, rel=0.35)  # 48 pictures, twice
        assert rows[category, "sharp"]["noise"] == rows[category, "clean"]["noise"] == 0
        assert rows[category, "sharp"]["reliability"] == 1
        assert 0 <= rows[category, "bright"]["reliability"] < 1


def test_another_stage_trains_with_the_weights_and_the_noise(done: Path) -> None:
    rows = [json.loads(line) for line in (done / "teacher" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(0 <= row["advantage/reliability/bright"] < 1 for row in rows)
    assert all(row["advantage/reliability/sharp"] == 1 for row in rows)
    manifest = json.loads((done / "teacher" / "manifest.json").read_text())
    assert "result of weights" in manifest["inputs"]


def test_calibrated_rewards_are_compared_by_their_noise_unless_told_otherwise(folder: Path) -> None:
    def named(*overrides: str) -> str:
        text = RECIPE.replace("    advantage: reliability-z\n", "")
        (folder / "plain.yaml").write_text(text)
        return plan_run(folder / "plain.yaml", overrides).recipe.stage("teacher").advantage.use

    assert named() == "reliability-z"
    assert named("stages.teacher.advantage=group-z") == "group-z"
    assert named("stages.teacher.weights_from=null") == "group-z"


def test_a_finished_calibration_is_not_done_again_and_a_changed_one_is(done: Path, start: Start) -> None:
    before = (done / "weights" / "manifest.json").stat().st_mtime_ns
    start("done")
    assert (done / "weights" / "manifest.json").stat().st_mtime_ns == before


def test_a_cut_off_calibration_goes_on_and_ends_the_same(done: Path, start: Start, monkeypatch: Any) -> None:
    real, drawn = calibrate._measure, []

    def counted(stage: Any, policy: Any, sampler: Any, judges: Any, prompts: Any, first: int, bar: Any) -> Any:
        if len(drawn) == 2:
            drawn.append(-1)
            raise KeyboardInterrupt
        drawn.append(first)
        return real(stage, policy, sampler, judges, prompts, first, bar)

    monkeypatch.setattr(calibrate, "_measure", counted)
    with pytest.raises(KeyboardInterrupt):
        start("cut", only="weights")
    run = done.parent / "cut"
    kept = {path.name: path.stat().st_mtime_ns for path in (run / "weights" / "blocks").iterdir()}
    assert len(kept) == 2
    start("cut", only="weights")
    assert {
        path.name: path.stat().st_mtime_ns for path in (run / "weights" / "blocks").iterdir()
    }.items() >= kept.items()
    for name in ("calibration.json", "weight_ledger.parquet"):
        assert (run / "weights" / name).read_bytes() == (done / "weights" / name).read_bytes()


def test_a_resumed_teacher_remembers_and_ends_the_same(done: Path, tmp_path: Path, folder: Path) -> None:
    run = folder / "resumed"
    shutil.copytree(done, run)
    teacher = run / "teacher"
    for path in (*(teacher / "checkpoints").glob("step-00000[34]"),):
        shutil.rmtree(path)
    assert (teacher / "checkpoints" / "step-000002" / "memory-advantage.safetensors").exists()
    (teacher / "weights.safetensors").unlink()
    manifest = json.loads((teacher / "manifest.json").read_text())
    (teacher / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    run_pipeline(folder / "small.yaml", [f"output={run}"])
    assert (teacher / "weights.safetensors").read_bytes() == (done / "teacher" / "weights.safetensors").read_bytes()


def test_the_report_shows_weights_shares_and_reasons(done: Path) -> None:
    page = build_report(done).read_text()
    assert 'id="calibration"' in page
    assert "budget as written" in page and "portrait" in page


def test_a_conflict_is_marked_and_said(start: Start) -> None:
    """A guard that is the opposite of the only reward cannot be kept from falling."""
    said: list[str] = []
    sink = logger.add(said.append, format="{message}")
    run = start(
        "conflict", f"{STAGE}.rewards=[{{use: noisy/brightness, name: bright}}]", f"{STAGE}.kappa=0.05",
        f"{STAGE}.guards=[{{use: noisy/brightness, name: dark, with: {{sign: -1.0}}}}]",
        f"{STAGE}.budgets={{default: {{bright: 1.0}}}}", "stages.teacher.weights_from=null",
        "stages.teacher.advantage=group-z", only="weights",
    )  # fmt: skip
    logger.remove(sink)
    rows = ledger(run)
    assert all(row["is_conflicting"] for row in rows.values())
    assert rows["single", "dark"]["correlation"] == pytest.approx(-1, abs=0.01)
    assert any("conflicting" in line and "dark" in line for line in said)


def test_failures_are_counted_and_enter_nothing(done: Path, start: Start) -> None:
    run = start(
        "failing", f"{STAGE}.rewards.0.with.fails=0.2", f"{STAGE}.max_failed=0.6", "stages.teacher.weights_from=null",
        "stages.teacher.advantage=group-z", only="weights",
    )  # fmt: skip
    manifest = json.loads((run / "weights" / "manifest.json").read_text())
    assert manifest["result"]["failures"] > 0
    rows = ledger(run)
    assert rows["single", "bright"]["noise"] == pytest.approx(0.01, rel=0.5)


def test_what_failed_before_an_interruption_is_counted_with_the_rest(start: Start) -> None:
    rewards = "[{use: noisy/brightness, name: bright, with: {fails: 0.2}}]"
    rater = "[{use: noisy/brightness, dimension: looks, with: {fails: 0.2}}]"
    given = (
        "counting", "stages.teacher.weights_from=null", "stages.teacher.advantage=group-z", "task.with.count=12",
        f"{STAGE}.rewards.0.with.fails=0.2", f"{STAGE}.max_failed=0.6",
        "stages.choose={stage: curate, group_size: 8, repeats: 2, confirm: true, max_failed: 0.6, rewards: "
        f"{rewards}, prompt_filter: {{use: range, with: {{quantile: 0.5}}}}}}",
        f"stages.rated={{stage: rate, group_size: 8, max_failed: 0.6, raters: {rater}}}",
    )  # fmt: skip

    def failures(stage: str) -> tuple[int, Path]:
        folder = start(*given, only=stage) / stage
        return json.loads((folder / "manifest.json").read_text())["result"]["failures"], folder

    for stage in ("weights", "choose", "rated"):
        before, folder = failures(stage)
        assert before > 0
        for block in [path for path in folder.glob("blocks*/*") if path.name.startswith("000000")]:
            block.unlink()
        assert list(folder.glob("blocks*/*"))
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
        assert failures(stage)[0] == before


def test_weights_follow_a_policy_that_changed_and_a_resumed_run_follows_alike(folder: Path, start: Start) -> None:
    rewards = "[{use: noisy/brightness, name: bright}, {use: noisy/echo, name: echo}, " \
              "{use: tinyworld-sharpness, name: sharp}]"  # fmt: skip
    given = (
        f"{STAGE}.rewards={rewards}", f"stages.teacher.rewards={rewards}", f"{STAGE}.prior_groups=1.0",
        f"{STAGE}.budgets={{default: {{bright: 0.34, echo: 0.33, sharp: 0.33}}}}", "stages.teacher.prompts_per_step=24",
        "stages.teacher.recalibrate={every: 4, max_change: 0.05, bootstrap: 5}", "stages.teacher.updates_per_step=2",
    )  # fmt: skip
    start("following", *given, only="weights")
    (folder / "echoes").touch()
    try:
        run = start("following", *given)
        teacher = run / "teacher"
        log = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
        assert [row["weights/version"] for row in log] == [0, 2, 2, 4]  # 2 x 24 groups, in two categories; 2 updates
        rows = pq.read_table(teacher / "weight_ledger.parquet").to_pylist()
        assert [(row["version"], row["policy_step"]) for row in rows if row["reward"] == "sharp"] == [
            (0, 0), (0, 0), (1, 2), (2, 2), (3, 4), (4, 4)
        ]  # fmt: skip
        for category in ("portrait", "single"):
            sharp = [r["weight"] for r in rows if r["category"] == category and r["reward"] == "sharp"]
            assert sharp[1] - sharp[0] == pytest.approx(0.05) and sharp[2] > sharp[1]
        assert {r["policy"] for r in rows} == {"base", "teacher"}
        assert "from step 2 on" in build_report(run).read_text()
        before = (teacher / "weights.safetensors").read_bytes()
        for path in (teacher / "checkpoints").glob("step-00000[34]"):
            shutil.rmtree(path)
        (teacher / "weights.safetensors").unlink()
        manifest = json.loads((teacher / "manifest.json").read_text())
        (teacher / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
        start("following", *given)
        assert pq.read_table(teacher / "weight_ledger.parquet").to_pylist() == rows
        assert (teacher / "weights.safetensors").read_bytes() == before
    finally:
        (folder / "echoes").unlink()


def test_a_curate_stage_compares_with_the_same_weights_in_units_of_each_spread(done: Path, start: Start) -> None:
    start(
        "done", "stages.choose={stage: curate, weights_from: weights, group_size: 4, prompt_filter: {use: range}}",
        only="choose",
    )  # fmt: skip
    rows = pq.read_table(done / "choose" / "ledger.parquet").to_pylist()
    found = read_calibration(done, "weights")
    for row in rows:
        weight = {r: found.weights[row["category"]][r] / found.spread[row["category"]][r] for r in ("bright", "sharp")}
        mean = sum(weight[r] * row[f"reward/{r}/mean"] for r in weight) / sum(weight.values())
        assert row["mean"] == pytest.approx(mean, rel=1e-4)


def pairs_file(folder: Path, prompts: list[str], prefers: Callable[[int], str]) -> Path:
    """Pictures that differ a little in brightness and a lot in grain, which sharpness sees."""
    rng, lines = np.random.default_rng(0), []
    (folder / "people").mkdir(exist_ok=True)
    for number in range(60):
        for side, level, grain in zip("ab", rng.integers(114, 142, 2), rng.integers(1, 110, 2), strict=True):
            noise = rng.integers(-int(grain), int(grain) + 1, size=(24, 24, 3))
            Image.fromarray((int(level) + noise).clip(0, 255).astype(np.uint8)).save(
                folder / "people" / f"{number}{side}.png"
            )
        prompt = prompts[number % len(prompts)]
        lines.append({"prompt": prompt, "a": f"{number}a.png", "b": f"{number}b.png", "preferred": prefers(number)})
    path = folder / "people" / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def light(folder: Path, name: str) -> float:
    with Image.open(folder / "people" / name) as image:
        return float(np.asarray(image).mean())


def test_budgets_follow_people_where_that_holds_elsewhere(folder: Path, done: Path, start: Start) -> None:
    task = plan_run(folder / "small.yaml")
    from velatura.core.check import ready

    prompts = [p.id for p in ready(task.recipe, task.registry, "task", task.recipe.task_of("weights")).prompts("train")]
    pairs_file(folder, prompts, lambda i: "a")
    pairs_file(folder, prompts, lambda i: "a" if light(folder, f"{i}a.png") > light(folder, f"{i}b.png") else "b")
    overrides = ["stages.teacher.weights_from=null", "stages.teacher.advantage=group-z",
                 f"{STAGE}.human_pairs=people/pairs.jsonl"]  # fmt: skip
    run = start("fitted", *overrides, only="weights")
    told = json.loads((run / "weights" / "manifest.json").read_text())["result"]["human_pairs"]
    assert told["refused"] == "", told
    assert told["accuracy"] > 0.75 > told["equal"] and 0 < told["low"] < told["gain"]
    rows = ledger(run)
    assert rows["portrait", "bright"]["budget"] > 0.6
    assert "fitted to 60 pairs of 24 prompts" in rows["portrait", "bright"]["reason"]


@pytest.mark.parametrize(
    ("override", "place", "words"),
    [
        (f"{STAGE}.budgets.portrait.sharpp=0.1", "budgets.portrait.sharpp", "Did you mean 'sharp'?"),
        (f"{STAGE}.budgets.portrait.sharp=0.6", "budgets.portrait", "the shares sum to 0.9, not to 1"),
        (f"{STAGE}.budgets.portrait={{clean: 0.4, sharp: 0.6}}", "budgets.portrait.clean", "is a guard"),
        (f"{STAGE}.budgets.portrat={{sharp: 1.0}}", "budgets.portrat", "Did you mean 'portrait'?"),
        (f"{STAGE}.budgets={{portrait: {{sharp: 1.0}}}}", "budgets", "category 'single' and no budget"),
        (f"{STAGE}.guards=[{{use: tinyworld-sharpness, name: sharp}}]", "guards.0", "is a reward of this stage, too"),
        (f"{STAGE}.repeats=1", "repeats", "give 2 or more"),
        (f"{STAGE}.group_size=1", "group_size", "Take 2 or more"),
        (f"{STAGE}.prompts=teacher", "prompts", "comes from a stage of kind curate"),
        ("stages.teacher.weights_from=teacher", "weights_from", "needs its own result"),
        ("stages.teacher.weights_from=weight", "weights_from", "Did you mean 'weights'?"),
        ("stages.teacher.rewards.1.name=shap", "rewards.1", "Did you mean 'sharp'?"),
        ("stages.teacher.rewards.0.with.noise=0.5", "rewards.0", "is not the reward that 'weights' calibrates"),
        ("stages.teacher.task={use: tinyworld, with: {task: t2i, categories: [pair]}}", "weights_from", "'pair'"),
        ("stages.extra={stage: rl, recalibrate: {every: 5}}", "stages.extra", "name that stage in 'weights_from'"),
        ("stages.teacher.recalibrate={every: 0}", "recalibrate.every", "give 1 or more"),
        ("stages.teacher.weights_from=null", "advantage", "how noisy 'bright', 'sharp' is"),
        ("stages.teacher.advantage={use: group-z, with: {veto: {shap: 0.1}}}", "advantage", "Did you mean 'sharp'?"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(folder: Path, override: str, place: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan = plan_run(folder / "small.yaml", [override])
        check_combinations(plan.recipe, plan.registry)
    assert f"{place}" in str(caught.value) and words in str(caught.value)


def test_a_reward_with_a_share_where_it_does_not_apply(start: Start) -> None:
    with pytest.raises(
        RecipeError, match=r"'face' has 0\.5 of category 'single', but it applies to none of its prompts"
    ):
        start(
            "nowhere", f"{STAGE}.rewards=[{{use: tinyworld-portrait, name: face}}, "
            "{use: tinyworld-sharpness, name: sharp}]", f"{STAGE}.budgets={{default: {{face: 0.5, sharp: 0.5}}}}",
            "stages.teacher.weights_from=null", "stages.teacher.advantage=group-z", only="weights",
        )  # fmt: skip


def test_a_calibration_that_was_spoilt_is_said(done: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no finished calibration"):
        read_calibration(tmp_path, "weights")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "calibration.json").write_text('{"names": []}')
    with pytest.raises(CheckpointError, match="is not what the stage left"):
        read_calibration(tmp_path, "weights")
