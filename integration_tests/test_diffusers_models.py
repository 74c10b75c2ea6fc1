"""A stock model folder through the whole command: RL, distillation, and an export that stock code loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from velatura.core.cli import main

FAMILIES = Path(__file__).parent.parent / "unit_tests" / "adapters" / "families"
sys.path[:0] = [str(FAMILIES), str(FAMILIES.parent)]

REWARD = '''
"""How bright a picture is."""

import torch

from velatura.api import NoOptions, RewardModel, Scores, hookimpl


class Brightness(RewardModel[NoOptions]):
    """Mean of all pixels."""

    name = "brightness"

    def score(self, samples):
        return Scores.of(torch.stack([sample.image.mean() for sample in samples]))


@hookimpl
def velatura_reward():
    return [Brightness]
'''

RECIPE = """
seed: 0
engine: {kind: deepspeed, zero_stage: 1, threads: 1, device: cpu}
plugins: [./bright.py]
adapter: {use: qwen-image-21, with: {path: model, height: 64, width: 64, lora_rank: 2}}
sampling: {steps: 3, batch: 8}
guidance: {use: rollout-only, with: {scale: 2.0}}
rewards: [bright/brightness]
optimizer: {lr: 1.0e-2}
stages:
  t2i:
    stage: rl
    task: &t2i {use: prompts, with: {file: t2i.jsonl, eval_file: t2i.jsonl}}
    steps: 2
    prompts_per_step: 2
    group_size: 3
  edit:
    stage: rl
    task: &edit {use: prompts, with: {file: edit.jsonl, eval_file: edit.jsonl, task: edit}}
    steps: 2
    prompts_per_step: 2
    group_size: 3
  student:
    stage: distill
    teachers: {t2i: t2i, edit: edit}
    tasks: {t2i: {use: prompts, with: {file: more.jsonl, eval_file: t2i.jsonl}}}
    guidance: {use: teacher-only, with: {scale: 2.0}}
    steps: 2
    prompts_per_step: 4
    probe_prompts: 2
  export: {stage: export, model: student}
"""

LOAD = """
import sys, torch
from diffusers import QwenImage21Transformer2DModel
assert not any(name.startswith("velatura") for name in sys.modules)
net = QwenImage21Transformer2DModel.from_pretrained(sys.argv[1] + "/transformer")
print(sum(p.numel() for p in net.parameters()))
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import qwen_image_21

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    qwen_image_21.build(tmp_path / "model")
    (tmp_path / "bright.py").write_text(REWARD)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, size in (("wide", (96, 64)), ("high", (64, 96))):
        Image.new("RGB", size, (200, 30, 90)).save(tmp_path / f"{name}.png")
    t2i = [{"prompt": "a red fox"}, {"prompt": "two blue birds on a wire", "size": [32, 64]}]
    edits = [{"prompt": f"make it {name}", "sources": [f"{name}.png"]} for name in ("wide", "high")]
    edits.append({"prompt": "put one beside the other", "sources": ["wide.png", "high.png"]})
    more = [{"prompt": f"a {colour} fox"} for colour in ("green", "grey", "white")]
    for name, lines in (("t2i", t2i), ("edit", edits), ("more", more)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_teachers_and_a_student_of_a_stock_model(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe.yaml"]) == 0
    assert "student: 3 prompts of task 'prompts'" in capsys.readouterr().out
    run = workspace / "runs" / "recipe"
    for stage in ("t2i", "edit", "student"):
        facts = json.loads((run / stage / "manifest.json").read_text())
        assert facts["status"] == "finished"
        assert facts["result"]["relative_change"] > 0
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2
    weights = (run / "student" / "weights.safetensors").stat().st_size
    assert weights < (workspace / "model" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    model = run / "export" / "model"
    assert (model / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((model / "velatura.json").read_text())["guidance_scale"] == 1.0
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, model], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout.split()[-1]) == 43088


def test_the_example_without_a_download_learns_edits_and_draws_from_two_sources(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny_model

    tiny_model.main(["qwen_image_21", "tiny"])
    root = Path(__file__).parent.parent
    example = str(root / "examples" / "tiny_model" / "recipe.yaml")
    assert main(["run", example, f"adapter.with.path={workspace / 'tiny'}", "output=run", "--stage", "edit"]) == 0
    pictures = [str(root / "recipes" / "prompts" / "sources" / f"{name}.png") for name in ("house", "table")]
    sources = [word for picture in pictures for word in ("--source", picture)]
    told = ["sample", "run", "one beside the other", "--stage", "edit", "--count", "1", "--device", "cpu"]
    assert main([*told, *sources, "--out", "two.png"]) == 0
    assert main([*told, *sources[2:], "--out", "last.png"]) == 0
    with Image.open("two.png") as two, Image.open("last.png") as last:
        assert two.width > 1.3 * last.width  # both sources beside the picture
    capsys.readouterr()
    assert main([*told[:-1], "gpu"]) == 2
    assert "--device is 'gpu', which cannot be used here" in capsys.readouterr().err
    assert main(["export", "run", "--stage", "edit", "--to", "exported"]) == 0


def test_check_says_where_in_the_recipe_an_adapter_cannot_do_what_is_asked(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sd3

    sd3.build(workspace / "drawing")
    text = (workspace / "recipe.yaml").read_text()
    (workspace / "empty").mkdir()
    for old, new, place, message in [
        ("path: model", "path: empty", "recipe.yaml:5: adapter: ", "empty is no model folder"),
        ("use: qwen-image-21, with: {path: model", "use: sd3, with: {path: drawing", "recipe.yaml:17: stages.edit: ",
         "(put one beside the other) has 2 source image(s), but 'sd3' only draws from text"),
    ]:  # fmt: skip
        assert old in text
        (workspace / "recipe.yaml").write_text(text.replace(old, new))
        assert main(["check", "recipe.yaml"]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert place in told
        assert message in told


def test_a_model_whose_weights_changed_is_trained_again(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["run", "recipe.yaml", "stages.t2i.steps=1", "--stage", "t2i"]
    assert main(only) == 0
    assert main(only) == 0
    assert "finished before and unchanged" in capsys.readouterr().out
    import qwen_image_21

    qwen_image_21.build(workspace / "model", seed=1)
    assert main(only) == 0
    assert "done again, because this changed: weights of the base" in capsys.readouterr().out
