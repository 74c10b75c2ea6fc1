"""Ablation files: what is refused, which runs they need, what stages arms share, and what is found in the tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loguru import logger

from velatura.core.ablation.jobs import Job, borrow, check_jobs, jobs_of, run_jobs
from velatura.core.ablation.results import find, save
from velatura.core.ablation.settings import load_ablation
from velatura.core.cli.program import main
from velatura.core.errors import RecipeError, VelaturaError

RECIPE = """\
seed: 0
engine: {kind: local, threads: 1, device: cpu}
adapter: {use: tinyworld, with: {weights: null, width: 32, heads: 2, layers: 1}}
sampling: {steps: 2, batch: 64}
guidance: none
stages:
  pick:
    stage: curate
    task: {use: tinyworld, with: {task: t2i, count: 4}}
    rewards: [tinyworld-sharpness]
    group_size: 2
    prompt_filter: {use: range, with: {threshold: 0.0}}
  teacher:
    stage: rl
    prompts: pick
    rewards: [tinyworld-sharpness]
    steps: 1
    prompts_per_step: 2
    group_size: 2
  compare:
    stage: evaluate
    models: [base, teacher]
    tasks: {t2i: {use: tinyworld, with: {task: t2i, eval_count: 3}}}
    evaluators: [tinyworld-gold]
    seeds_per_prompt: 2
"""
FILE = """\
question: Is more better?
claim: More is better.
source: nobody
recipe: tiny.yaml
evaluation: compare
model: teacher
seeds: [0, 1]
arms:
  one: {}
  same: {set: {}}
  two: {set: {stages.teacher.optimizer.lr: 0.001}}
metrics: [gold/alignment, gold/strict]
expect:
  - {metric: gold/alignment, more: two, than: base}
  - {metric: gold/alignment, more: two, than: one}
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the recipe and an ablation file, with another text in place of a part of it."""

    def make(old: str = "", new: str = "") -> Path:
        assert old in FILE
        (tmp_path / "tiny.yaml").write_text(RECIPE)
        path = tmp_path / "more.yaml"
        path.write_text(FILE.replace(old, new) if old else FILE)
        return path

    return make


def table(gains: Mapping[str, float], seed: int, prompts: int = 12, noise: float = 0.02) -> pa.Table:
    """An evaluation in which each model lies by its gain above the base, prompt by prompt, with some noise."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.2, 0.8, size=(prompts, 2))
    rows: dict[str, list[object]] = {
        name: [] for name in ("model", "route", "category", "prompt_id", "unit", "text", "seed", "gold/alignment")
    }
    for model, gain in gains.items():
        for p in range(prompts):
            for j in range(2):
                value = base[p, j] + gain + (noise * rng.standard_normal() if gain else 0.0)
                values = (
                    model,
                    "t2i",
                    "even" if p % 2 == 0 else "odd",
                    f"p{p}",
                    f"u{p}",
                    f"text {p}",
                    100 * seed + j,
                    value,
                )
                for name, item in zip(rows, values, strict=True):
                    rows[name].append(item)
    return pa.table(rows)


def finished(path: Path, jobs: Mapping[tuple[str, int], Job], gains: Mapping[str, float]) -> None:
    """Leave what finished runs leave."""
    for (arm, seed), job in jobs.items():
        folder = job.folder / "compare"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table({"base": 0.0, "teacher": gains[arm]}, seed), folder / "samples.parquet")


def test_arms_that_set_the_same_share_a_run(write: Write, tmp_path: Path) -> None:
    ablation = load_ablation(write())
    jobs = jobs_of(ablation, tmp_path / "out")
    assert {key: job.folder.relative_to(tmp_path / "out").as_posix() for key, job in jobs.items()} == {
        ("one", 0): "one/seed-0", ("one", 1): "one/seed-1", ("same", 0): "one/seed-0", ("same", 1): "one/seed-1",
        ("two", 0): "two/seed-0", ("two", 1): "two/seed-1",
    }  # fmt: skip
    assert jobs["two", 1].overrides == ("stages.teacher.optimizer.lr=0.001",)


def test_differences_and_verdict(write: Write, tmp_path: Path) -> None:
    ablation = load_ablation(write())
    jobs = jobs_of(ablation, tmp_path / "out")
    finished(tmp_path, jobs, {"one": 0.02, "same": 0.02, "two": 0.1})
    found = find("more", ablation, jobs)
    assert found.verdict == "reproduced"
    over_base, over_one = (test.difference for test in found.tested)
    assert over_base.value == pytest.approx(0.1, abs=0.01) and over_one.value == pytest.approx(0.08, abs=0.015)
    assert over_base.low < 0.1 < over_base.high and over_base.n_prompts == 12
    assert len(over_base.by_seed) == 2
    assert set(found.gains["t2i"]) == {"gold/alignment"}  # no table has gold/strict

    finished(tmp_path, jobs, {"one": 0.15, "same": 0.15, "two": 0.07})
    found = find("more", ablation, jobs)
    assert found.verdict == "not reproduced"
    assert [test.outcome for test in found.tested] == ["shown", "opposite"]
    assert "two minus one -0.08" in found.sentence() and "2 of 2 seeds on this side" in found.sentence()


def test_what_this_world_cannot_decide_is_said_so(write: Write, tmp_path: Path) -> None:
    ablation = load_ablation(write("source: nobody", "source: nobody\nnot_testable: Pictures are too small."))
    jobs = jobs_of(ablation, tmp_path / "out")
    finished(tmp_path, jobs, {"one": 0.02, "same": 0.02, "two": 0.1})
    assert find("more", ablation, jobs).sentence().startswith("Not testable here. Pictures are too small. gold/")


def test_one_category_alone(write: Write, tmp_path: Path) -> None:
    ablation = load_ablation(write("more: two, than: one", "more: two, than: one, category: odd"))
    jobs = jobs_of(ablation, tmp_path / "out")
    finished(tmp_path, jobs, {"one": 0.0, "same": 0.0, "two": 0.1})
    assert [test.difference.n_prompts for test in find("more", ablation, jobs).tested] == [12, 6]


def test_the_figure_shows_every_arm_and_the_files_are_complete(write: Write, tmp_path: Path) -> None:
    ablation = load_ablation(write())
    jobs = jobs_of(ablation, tmp_path / "out")
    finished(tmp_path, jobs, {"one": 0.02, "same": 0.02, "two": 0.1})
    page = save(find("more", ablation, jobs), tmp_path / "out")
    root = ElementTree.fromstring((tmp_path / "out" / "figure.svg").read_text())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"one", "same", "two", "Is more better?", "gold/alignment, minus base"} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3 * (2 + 1)  # seeds and mean of each arm
    facts = json.loads((tmp_path / "out" / "results.json").read_text())
    assert facts["verdict"] == "reproduced" and facts["tested"][0]["outcome"] == "shown"
    assert page.read_text().startswith("# Is more better?") and "figure.svg" in page.read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("more: two, than: one", "more: tow, than: one", "no arm is called 'tow'. Did you mean 'two'?"),
        ("more: two, than: one", "more: two, than: two", "expect.1: 'two' is compared with itself"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "a seed stands there twice"),
        ("model: teacher", "model: student", "'compare' does not measure the model 'student'"),
        ("model: teacher\n", "", "arm 'one' has no 'model'"),
        ("evaluation: compare", "evaluation: teacher", "which is of kind rl, not evaluate"),
        ("evaluation: compare", "evaluation: compere", "no stage is called 'compere'. Did you mean 'compare'?"),
        ("stages.teacher.optimizer.lr: 0.001", "stages.teacher.optimiser.lr: 0.001", "arms.two: command line: stages"),
        ("recipe: tiny.yaml", "recipe: tinny.yaml", "there is no recipe"),
        ("metrics:", "metric:", "no such key. Did you mean 'metrics'?"),
        ("  one: {}", "  base: {}", "an arm cannot be called 'base'"),
    ],
)  # fmt: skip
def test_wrong_files_are_answered_with_the_place_and_the_remedy(write: Write, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_ablation(write(old, new))
    assert message in str(refused.value) and "more.yaml" in str(refused.value)


def test_a_metric_that_nobody_measured_is_named_with_what_there_is(write: Write, tmp_path: Path) -> None:
    ablation = load_ablation(write("{metric: gold/alignment, more: two, than: one}",
                                   "{metric: gold/alinement, more: two, than: one}"))  # fmt: skip
    jobs = jobs_of(ablation, tmp_path / "out")
    finished(tmp_path, jobs, {"one": 0.0, "same": 0.0, "two": 0.1})
    with pytest.raises(VelaturaError, match=r"gold/alinement in both\. Did you mean 'gold/alignment'\?"):
        find("more", ablation, jobs)


def test_arms_take_over_what_they_share_and_a_failed_run_leaves_the_others(write: Write, tmp_path: Path) -> None:
    """Real runs in processes of their own."""
    path = write()
    raw: list[str] = []
    logger.add(raw.append, level="DEBUG")  # as loguru has it on stderr from the start
    status = main(
        [
            "ablate",
            str(path),
            "--output",
            str(tmp_path / "out"),
            "--jobs",
            "2",
            "--seeds",
            "0",
            "--publish",
            str(tmp_path / "pub"),
        ]
    )
    assert status == 0
    assert raw == []  # log lines go through the console, above the progress bar
    one, two = (tmp_path / "out" / "more" / arm / "seed-0" for arm in ("one", "two"))
    first, second = (json.loads((folder / "pick" / "manifest.json").read_text()) for folder in (one, two))
    assert first == second  # copied, not done again
    assert (one / "teacher" / "weights.safetensors").read_bytes() != (
        two / "teacher" / "weights.safetensors"
    ).read_bytes()
    assert (tmp_path / "out" / "more" / "verdict.md").exists()
    assert {p.name for p in (tmp_path / "pub").iterdir()} == {"more.json", "more.svg"}

    changed = [f"output={tmp_path / 'third'}", "stages.teacher.steps=2", "engine.threads=1", "seed=0"]
    assert borrow(tmp_path / "tiny.yaml", changed, tmp_path / "third", [two]) == ["pick"]
    elsewhere = [f"output={tmp_path / 'fourth'}", "stages.pick.group_size=3", "seed=0"]
    assert borrow(tmp_path / "tiny.yaml", elsewhere, tmp_path / "fourth", [two]) == []

    shutil.rmtree(tmp_path / "third")
    wrong = Job("wrong", 0, ("stages.teacher.objective=ntf",), tmp_path / "jobs" / "wrong")
    with pytest.raises(RecipeError, match=r"^arm 'wrong': .*no objective is called 'ntf'\. Did you mean 'nft'"):
        check_jobs(tmp_path / "tiny.yaml", [wrong])

    good = Job("good", 0, ("stages.teacher.steps=1",), tmp_path / "jobs" / "good")
    bad = Job("bad", 1, ("stages.pick.prompt_filter.with.threshold=5.0",), tmp_path / "jobs" / "bad")
    with pytest.raises(VelaturaError) as failed:
        run_jobs(tmp_path / "tiny.yaml", [good, bad], at_once=2, console=None)
    assert "1 of 2 runs failed" in str(failed.value) and "kept no prompt" in str(failed.value)
    assert json.loads((good.folder / "compare" / "manifest.json").read_text())["status"] == "finished"
