"""A whole recipe through the real command: what it leaves, what it does again, and what the other verbs make of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from loguru import logger
from PIL import Image
from safetensors.torch import load_file

from velatura.core.cli import main

TINY = Path(__file__).with_name("recipes") / "tiny.yaml"
Run = Callable[..., subprocess.CompletedProcess[str]]
Original = tuple[Path, subprocess.CompletedProcess[str]]
Capture = pytest.CaptureFixture[str]
STAGES = ["warm", "curate_t2i", "curate_edit", "teacher_t2i", "teacher_edit", "student", "compare", "export"]
TRAINED = {"warm": 12, "teacher_t2i": 6, "teacher_edit": 3, "student": 6}
RUN = Path("runs/tiny")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, console_script: Run) -> Original:
    """A folder with the recipe and its run by the installed command, and what was printed."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copy(TINY, folder / "tiny.yaml")
    return folder, console_script("run", "tiny.yaml", cwd=folder)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lines of a verb in this process are not broken; and it leaves no log behind that writes to its console."""
    monkeypatch.setenv("COLUMNS", "200")
    yield
    logger.remove()


@pytest.fixture
def folder(original: Original) -> Path:
    return original[0] / RUN


def manifest(folder: Path, stage: str) -> dict:
    return json.loads((folder / stage / "manifest.json").read_text())


def metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Everything a stage left but what is no result: the report and the folder's own papers."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.parent != folder}


def test_every_stage_finishes_and_says_what_it_was_made_from(folder: Path) -> None:
    for stage in STAGES:
        facts = manifest(folder, stage)
        assert facts["status"] == "finished"
        assert facts["seconds"] >= 0
        assert {"seed", "engine", "velatura"} <= facts["inputs"].keys()
    assert "result of warm" in manifest(folder, "teacher_t2i")["inputs"]
    assert {"result of teacher_t2i", "result of teacher_edit"} <= manifest(folder, "student")["inputs"].keys()


def test_the_resolved_recipe_and_the_environment_are_kept_with_the_run(original: Original, folder: Path) -> None:
    assert (folder / "recipe.yaml").read_text() == (original[0] / "tiny.yaml").read_text()
    resolved = json.loads((folder / "resolved.json").read_text())
    assert resolved["recipe"]["stages"]["teacher_t2i"]["objective"]["with"]["beta"] == 1.0  # a default, filled in
    assert {"velatura", "python", "torch", "diffusers"} <= resolved["environment"].keys()
    assert {"nft", "awm", "group-z"} <= {plugin["name"] for plugin in resolved["plugins"]}


def test_training_leaves_finite_weights_a_line_per_step_checkpoints_and_pictures(folder: Path) -> None:
    for stage, steps in TRAINED.items():
        weights = load_file(folder / stage / "weights.safetensors")
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())
        assert [row["step"] for row in metrics(folder, stage)] == list(range(steps))
        saved = sorted(path.name for path in (folder / stage / "checkpoints").iterdir())
        assert saved[-1] == f"step-{steps:06d}"
        assert len(saved) == 2
        assert list((folder / stage / "tensorboard").iterdir())
        assert manifest(folder, stage)["result"]["relative_change"] > 0
    assert (folder / "teacher_t2i" / "pictures" / "step-000006.png").exists()
    assert (folder / "student" / "pictures" / "edit-step-000006.png").exists()


def test_reinforcement_learning_moved_the_weights_and_says_what_it_measured(folder: Path) -> None:
    warm = load_file(folder / "warm" / "weights.safetensors")
    for stage in ("teacher_t2i", "teacher_edit", "student"):
        weights = load_file(folder / stage / "weights.safetensors")
        assert weights.keys() == warm.keys()
        assert any(not torch.equal(weights[name], warm[name]) for name in warm)
    row = metrics(folder, "teacher_t2i")[-1]
    named = ("reward/sharpness", "reward/aesthetics", "reward/composite", "loss", "grad_norm", "rows/gradient")
    assert all(any(key.startswith(name) for key in row) for name in named)
    assert {"time/rollout_s", "time/judge_s", "time/update_s", "time/step_s"} <= row.keys()


def test_the_student_is_measured_on_fixed_states_and_sampled_without_guidance(folder: Path) -> None:
    rows = metrics(folder, "student")
    probed = [row["step"] for row in rows if "probe/t2i" in row and "probe/edit" in row]
    assert probed == [0, 2, 5]
    facts = manifest(folder, "student")["result"]
    assert (facts["guidance_scale"], facts["folded"], facts["folded_scale"]) == (1.0, True, 2.0)
    assert manifest(folder, "teacher_t2i")["result"]["guidance_scale"] == 2.0


def test_curation_keeps_and_drops_with_a_reason_and_shows_both(folder: Path) -> None:
    for stage in ("curate_t2i", "curate_edit"):
        ledger = pq.read_table(folder / stage / "ledger.parquet").to_pylist()
        kept = json.loads((folder / stage / "kept.json").read_text())["prompt_ids"]
        assert [row["prompt_id"] for row in ledger if row["keep"]] == kept
        assert len(ledger) == 8
        assert len(kept) == 4
        assert all(row["reason"] for row in ledger)
        assert all(row["n_valid"] == row["n"] == 4 for row in ledger)
        summary = manifest(folder, stage)["result"]["by_category"]
        assert all(counts == {"prompts": 4, "kept": 2} for counts in summary.values())
        assert {p.name for p in (folder / stage / "pictures").iterdir()} == {"kept.png", "dropped.png", "captions.json"}


def test_every_model_draws_the_same_prompts_with_the_same_seeds(folder: Path) -> None:
    rows = pq.read_table(folder / "compare" / "samples.parquet").to_pylist()
    models = {(row["model"], row["route"]) for row in rows}
    assert models == {
        ("warm", "t2i"), ("warm", "edit"), ("student", "t2i"), ("student", "edit"), ("teacher_t2i", "t2i"),
        ("teacher_edit", "edit"),
    }  # fmt: skip
    pairs = {m: sorted((r["prompt_id"], r["seed"]) for r in rows if (r["model"], r["route"]) == m) for m in models}
    assert all(len(own) == 16 and own == pairs["warm", route] for (_, route), own in pairs.items())
    assert {row["prompt_id"].split("/")[2] for row in rows} == {"eval"}
    assert "gold/alignment" in rows[0]
    assert "reward/sharpness" in rows[0]
    images = np.load(folder / "compare" / "images" / "student" / "t2i.npz")["images"]
    assert images.shape == (16, 24, 24, 3)


def test_the_closing_summary_says_where_things_are_and_what_to_do_next(original: Original, folder: Path) -> None:
    printed = original[1].stdout
    assert "runs/tiny/report.html" in printed
    assert "runs/tiny/export/model" in printed
    assert "velatura sample runs/tiny " in printed
    page = (folder / "report.html").read_text()
    assert all(stage in page for stage in STAGES)


def test_a_run_that_is_right_says_nothing_on_stderr(original: Original) -> None:
    assert original[1].stderr == ""


def test_a_second_run_does_nothing_and_says_why(workspace: Path, capsys: Capture) -> None:
    before = contents(workspace / RUN)
    assert main(["run", "tiny.yaml"]) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert said[:8] == [f"[{i}/8] {stage}: finished before and unchanged" for i, stage in enumerate(STAGES, start=1)]
    assert contents(workspace / RUN) == before


def test_a_changed_option_redoes_its_stage_and_those_that_build_on_it(workspace: Path, capsys: Capture) -> None:
    before = contents(workspace / RUN)
    assert main(["run", "tiny.yaml", "stages.student.steps=4"]) == 0
    after = contents(workspace / RUN)
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for i, stage in enumerate(STAGES[:5], start=1):
        assert f"[{i}/8] {stage}: finished before and unchanged" in said
        own = {path: content for path, content in before.items() if path.startswith(f"{stage}/")}
        assert own.items() <= after.items()
    assert "[6/8] student: done again, because this changed: option steps" in said
    assert "[7/8] compare: done again, because this changed: result of student" in said
    assert "[8/8] export: done again, because this changed: result of student" in said
    aside = {path.name.split("-")[0]: path for path in (workspace / RUN / "replaced").iterdir()}
    assert set(aside) == {"student", "compare", "export"}
    assert (aside["student"] / "weights.safetensors").read_bytes() == before["student/weights.safetensors"]
    assert after["student/weights.safetensors"] != before["student/weights.safetensors"]


def redone(folder: Path) -> set[str]:
    aside = folder / "replaced"
    return {path.name.rsplit("-", 2)[0] for path in aside.iterdir()} if aside.exists() else set()


def test_other_held_out_prompts_are_evaluated_again(workspace: Path) -> None:
    """The evaluation takes its prompts from the curation's task, whose result stays the same."""
    assert main(["run", "tiny.yaml", "stages.curate_t2i.task.with.eval_count=2"]) == 0
    assert {"curate_t2i", "compare"} <= redone(workspace / RUN)
    rows = pq.read_table(workspace / RUN / "compare" / "samples.parquet").to_pylist()
    assert len([row for row in rows if (row["model"], row["route"]) == ("student", "t2i")]) == 8


def test_a_changed_seed_redoes_everything_trained(workspace: Path) -> None:
    assert main(["run", "tiny.yaml", "seed=6", "--stage", "warm"]) == 0
    assert redone(workspace / RUN) == {"warm"}


def test_fresh_with_a_stage_does_that_stage_alone_again(workspace: Path) -> None:
    before = contents(workspace / RUN)
    assert main(["run", "tiny.yaml", "--stage", "student", "--fresh"]) == 0
    assert redone(workspace / RUN) == {"student"}
    after = contents(workspace / RUN)
    assert after["student/weights.safetensors"] == before["student/weights.safetensors"]


def test_a_stage_alone_needs_what_it_builds_on(tmp_path: Path, original: Original, capsys: Capture) -> None:
    shutil.copy(original[0] / "tiny.yaml", tmp_path / "tiny.yaml")
    assert main(["run", str(tmp_path / "tiny.yaml"), f"output={tmp_path / 'out'}", "--stage", "teacher_t2i"]) == 2
    assert "Run it first" in capsys.readouterr().err


LOADS = """
import sys, torch
from diffusers import QwenImage21Transformer2DModel
net = QwenImage21Transformer2DModel.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] == "velatura" for name in sys.modules)
torch.save(net.state_dict(), sys.argv[2])
"""


def test_the_exported_transformer_loads_without_velatura(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights.pt"
    transformer = folder / "export" / "model" / "transformer"
    subprocess.run([sys.executable, "-W", "error", "-c", LOADS, str(transformer), str(target)], check=True)
    loaded, trained = torch.load(target), load_file(folder / "student" / "weights.safetensors")
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_export_draws_the_same_picture_as_velatura(workspace: Path) -> None:
    """One prompt and seed, by `velatura sample` and by the script in the exported folder, which knows no Velatura."""
    prompt = "a red circle on blue"
    assert main(["sample", str(RUN), prompt, "--seed", "3", "--count", "1", "--out", "ours.png"]) == 0
    script = workspace / RUN / "export" / "model" / "sample.py"
    subprocess.run([sys.executable, script, prompt, "theirs.png", "--seed", "3"], check=True)
    ours, theirs = pixels("ours.png"), pixels("theirs.png")
    scale, gap = 8, 4
    small = ours[gap:-gap:scale, gap:-gap:scale]
    factor = theirs.shape[0] // 24
    assert small.shape == (24, 24, 3)
    assert np.abs(small - theirs[::factor, ::factor]).max() <= 1  # rounding to 8 bits


def test_sample_draws_and_warns_of_guiding_what_has_guidance_folded_in(workspace: Path, capsys: Capture) -> None:
    assert main(["sample", str(RUN), "a red circle on blue", "--count", "2", "--out", "drawn.png"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == "drawn.png"
    assert err == ""
    height, width, _ = pixels("drawn.png").shape
    assert width > height
    guided = ["--guidance", "3", "--out", "guided.png"]
    assert main(["sample", str(RUN), "a red circle on blue", "--count", "2", *guided]) == 0
    assert "has guidance 2 folded in" in capsys.readouterr().err
    assert Path("guided.png").read_bytes() != Path("drawn.png").read_bytes()


def test_sample_edits_a_picture(workspace: Path, capsys: Capture) -> None:
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save("source.png")
    edit = ["make the circle red", "--source", "source.png", "--stage", "teacher_edit", "--out", "edited.png"]
    assert main(["sample", str(RUN), *edit]) == 0
    assert Path("edited.png").exists()
    assert main(["sample", str(RUN), "make the circle red", "--source", "gone.png"]) == 2
    assert "gone.png" in capsys.readouterr().err


def test_export_writes_any_trained_stage(workspace: Path, capsys: Capture) -> None:
    assert main(["export", str(RUN), "--stage", "teacher_t2i", "--to", "model"]) == 0
    assert capsys.readouterr().out.strip() == "model"
    exported = load_file("model/transformer/diffusion_pytorch_model.safetensors")
    trained = load_file(RUN / "teacher_t2i" / "weights.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in trained.items())
    assert json.loads(Path("model/velatura.json").read_text())["guidance_scale"] == 2.0
    assert main(["export", str(RUN), "--stage", "techer_t2i", "--to", "other"]) == 2
    assert "Did you mean 'teacher_t2i'?" in capsys.readouterr().err


def test_eval_compares_other_models_and_keeps_the_earlier_comparison(workspace: Path) -> None:
    assert main(["eval", str(RUN), "--models", "warm", "student"]) == 0
    rows = pq.read_table(RUN / "compare" / "samples.parquet").to_pylist()
    assert {row["model"] for row in rows} == {"warm", "student"}
    assert redone(RUN) == {"compare"}


def test_the_report_is_written_again(workspace: Path, capsys: Capture) -> None:
    page = RUN / "report.html"
    page.unlink()
    assert main(["report", str(RUN)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.stat().st_size > 10_000


def test_check_prints_the_plan_and_runs_nothing(tmp_path: Path, original: Original, capsys: Capture) -> None:
    assert main(["check", str(original[0] / "tiny.yaml"), f"output={tmp_path / 'out'}"]) == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in STAGES)
    assert all(name in text for name in ("group-z", "nft", "velocity-match", "tinyworld-gold"))
    assert "Nothing was run" in text
    assert not (tmp_path / "out").exists()


def test_verbs_on_a_folder_that_is_no_run(tmp_path: Path, capsys: Capture) -> None:
    for verb in (["sample", str(tmp_path), "a red circle"], ["eval", str(tmp_path)], ["report", str(tmp_path)],
                 ["export", str(tmp_path), "--to", "x"]):  # fmt: skip
        assert main(verb) == 2
        err = capsys.readouterr().err
        assert err.startswith("velatura: ")
        assert str(tmp_path) in err


def test_the_whole_recipe_runs_under_deepspeed_and_ends_close_to_plain_torch(deepspeed_run: Path, folder: Path) -> None:
    for stage in STAGES:
        assert manifest(deepspeed_run, stage)["status"] == "finished"
    ours, theirs = (load_file(run / "warm" / "weights.safetensors") for run in (folder, deepspeed_run))
    for name, value in ours.items():  # Adam's steps amplify rounding where gradients are small
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
    assert (deepspeed_run / "report.html").exists()
