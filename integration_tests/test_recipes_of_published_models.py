"""The shipped recipes for published models, whole, on tiny models with random weights of the same classes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from velatura.core.cli import main
from velatura.core.recipe import load_recipe

ROOT = Path(__file__).parent.parent
for folder in ("adapters/families", "rewards", "judge"):
    sys.path.insert(0, str(ROOT / "unit_tests" / folder))

SIDE = 32
"""Of pictures, in pixels."""
FAMILIES = {
    "qwen-image-21": ("qwen_image_21", {}),
    "sd35-medium": ("sd3", {"max_sequence_length": 16}),
    "flux1-dev": ("flux", {"text_tokens": 16}),
}
"""Recipe -> module that builds its family, and what makes its prompts short."""
PIPELINES = {"sd35-medium": "StableDiffusion3Pipeline", "flux1-dev": "FluxPipeline"}
"""Those that stock diffusers opens without torchvision."""
SMALL: dict[str, dict[str, Any]] = {
    "curate": {"max_prompts": 4, "group_size": 2, "sampling.steps": 2},
    "rl": {"steps": 2, "prompts_per_step": 2, "group_size": 2, "sampling.steps": 3},
    "distill": {"steps": 2, "prompts_per_step": 2, "sampling.steps": 2, "probe_prompts": 1},
    "evaluate": {"max_prompts": 2, "seeds_per_prompt": 1, "bootstrap": 20, "sampling.steps": 2},
    "export": {},
}
"""Kind of stage -> what makes it a matter of seconds."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model for every recipe, and a tiny CLIP."""
    import importlib

    import tiny_clip

    folder = tmp_path_factory.mktemp("models")
    for recipe, (family, _) in FAMILIES.items():
        importlib.import_module(family).build(folder / recipe)
    return tiny_clip.clip(folder / "clip").parent


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    """The address of a judge that likes bright pictures."""
    from chat_server import ChatServer

    with ChatServer() as server:
        yield server.address


def tiny(name: str, models: Path) -> list[str]:
    """The tiny model in place of the published one."""
    options = {"path": models / name, "height": SIDE, "width": SIDE, "lora_rank": 2, "lora_alpha": 4}
    return [f"adapter.with.{key}={value}" for key, value in {**options, **FAMILIES[name][1]}.items()]


def overrides(name: str, models: Path, judge: str | None) -> list[str]:
    """What is said on the command line: where tiny models are, and that everything is small."""
    said = ["engine.device=cpu", "engine.threads=1", "engine.precision=fp32", "sampling.batch=32"]
    said += tiny(name, models)
    for stage, config in load_recipe(ROOT / "recipes" / f"{name}.yaml").stages.items():
        said += [f"stages.{stage}.{key}={value}" for key, value in SMALL[config.stage].items()]
        if config.stage in ("rl", "distill"):
            said.append(f"stages.{stage}.optimizer.lr=1e-2")
        for slot in ("rewards", "evaluators"):
            for index, ref in enumerate(getattr(config, slot, [])):
                place = f"stages.{stage}.{slot}.{index}.with"
                if ref.use == "vlm-judge":
                    said += [f"{place}.server={judge}", f"{place}.model=judge-8b"]
                else:
                    said.append(f"{place}.path={models / 'clip'}")
    return said


def finish(name: str, arguments: Sequence[str], folder: Path) -> Path:
    """The folder of the run, all of whose stages are finished."""
    assert main(["run", name, f"output={folder}", *arguments]) == 0
    for stage in load_recipe(ROOT / "recipes" / f"{name}.yaml").stages:
        assert json.loads((folder / stage / "manifest.json").read_text())["status"] == "finished", stage
    return folder


def weights_moved(run: Path, stage: str) -> None:
    """Two steps were taken, both of which changed something."""
    steps = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1]
    assert all(step["updated"] == 1 and step["grad_norm"] > 0 for step in steps)
    assert json.loads((run / stage / "manifest.json").read_text())["result"]["relative_change"] > 0


def exported(run: Path, base: Path) -> dict[str, Any]:
    """What the export says of itself; its transformer is the base's in shape, and not in its numbers."""
    model = run / "export" / "model"
    file = "transformer/diffusion_pytorch_model.safetensors"
    new, old = load_file(model / file), load_file(base / file)
    assert {name: w.shape for name, w in new.items()} == {name: w.shape for name, w in old.items()}
    assert any(not torch.equal(new[name], old[name].to(new[name].dtype)) for name in old)
    facts: dict[str, Any] = json.loads((model / "velatura.json").read_text())
    return facts


def opened(model: Path, pipeline: str) -> None:
    """The stock pipeline loads the export and draws with it."""
    import diffusers

    pipe = getattr(diffusers, pipeline).from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red fox", height=32, width=32, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert drawn.shape == (1, 3, 32, 32)
    assert bool(drawn.isfinite().all())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
def test_check_says_what_each_would_do(
    name: str, models: Path, judge: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", name, *tiny(name, models)]) == 0
    said = capsys.readouterr().out
    assert all(stage in said for stage in load_recipe(ROOT / "recipes" / f"{name}.yaml").stages)
    said = " ".join(said.split())
    assert said.count("warning") == said.count("trains under allow_unvalidated_reward: it has no reward card") > 0


def test_check_refuses_guidance_of_a_distilled_model_and_names_the_stage(
    models: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guidance = [f"stages.teacher_content.guidance.{key}" for key in ("use=rollout-only", "with.scale=3")]
    assert main(["check", "flux1-dev", *tiny("flux1-dev", models), *guidance]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "stages.teacher_content: A guidance scale other than 1 was asked of" in said


def test_sd35_learns_from_pickscore_and_has_its_guidance_folded_in(models: Path, home: Path) -> None:
    name = "sd35-medium"
    run = finish(name, overrides(name, models, None), home / "run")
    for stage in ("teacher", "student"):
        weights_moved(run, stage)
    facts = exported(run, models / name)
    assert facts["guidance_scale"] == 1.0
    assert facts["folded_scale"] == 4.5
    opened(run / "export" / "model", PIPELINES[name])
    first = json.loads((run / "teacher" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["reward/composite"] == first["reward/pickscore/mean"]
    assert "reward/clip-score/mean" in first


def test_flux_learns_looks_and_content_apart_and_one_student_from_both(models: Path, home: Path) -> None:
    name = "flux1-dev"
    run = finish(name, [*overrides(name, models, None), "engine.precision=bf16"], home / "run")
    for stage in ("teacher_looks", "teacher_content", "student"):
        weights_moved(run, stage)
    facts = exported(run, models / name)
    assert not facts["guidance_folded"]
    opened(run / "export" / "model", PIPELINES[name])
    last = json.loads((run / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"probe/looks", "probe/content"} <= last.keys()


def test_qwen_is_curated_taught_twice_distilled_evaluated_and_exported(models: Path, home: Path, judge: str) -> None:
    name = "qwen-image-21"
    run = finish(name, overrides(name, models, judge), home / "run")
    for stage in ("teacher_t2i", "teacher_edit", "student"):
        weights_moved(run, stage)
    facts = exported(run, models / name)
    assert facts["guidance_scale"] == 1.0
    assert facts["folded_scale"] == 4.0
    from diffusers import QwenImage21Transformer2DModel

    QwenImage21Transformer2DModel.from_pretrained(run / "export" / "model" / "transformer")
