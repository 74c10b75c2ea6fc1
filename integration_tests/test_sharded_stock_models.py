"""Networks of diffusers whose weights two processes share (ZeRO 3) are taught and distilled as by one that has them."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from velatura.core.build import open_registry
from velatura.core.check import check_combinations
from velatura.core.cli import main
from velatura.core.recipe import load_recipe

FAMILIES = Path(__file__).parent.parent / "unit_tests" / "adapters" / "families"
sys.path.insert(0, str(FAMILIES))

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
engine: {kind: deepspeed, zero_stage: 1, threads: 1, device: cpu, timeout: 600}
plugins: [./bright.py]
adapter:
  use: qwen-image-21
  with: {path: qwen, height: 64, width: 64, lora_rank: 2, gradient_checkpointing: true}
sampling: {steps: 2, batch: 8}
guidance: {use: rollout-only, with: {scale: 2.0}}
timesteps: all
rewards: [bright/brightness]
optimizer: {lr: 1.0e-3, eps: 1.0e-5}
stages:
  edit:
    stage: rl
    task: {use: prompts, with: {file: edit.jsonl, eval_file: edit.jsonl, task: edit}}
    steps: 2
    prompts_per_step: 3
    group_size: 2
    updates_per_step: 2
  student:
    stage: distill
    teachers: {edit: edit}
    guidance: {use: teacher-only, with: {scale: 2.0}}
    steps: 2
    prompts_per_step: 3
    probe_prompts: 2
  whole:
    stage: rl
    adapter: &whole {use: sd3, with: {path: sd3, height: 32, width: 48, lora_rank: null}}
    task: {use: prompts, with: {file: t2i.jsonl, eval_file: t2i.jsonl}}
    steps: 2
    prompts_per_step: 3
    group_size: 2
  whole_student:
    stage: distill
    adapter: *whole
    teachers: {t2i: whole}
    guidance: {use: teacher-only, with: {scale: 2.0}}
    steps: 2
    prompts_per_step: 2
    probe_prompts: 2
"""
SHARDED = (
    "engine.zero_stage=3", "engine.offload_optimizer=true", "engine.offload_weights=true",
    "engine.raw={zero_optimization: {stage3_param_persistence_threshold: 0}}",
)  # fmt: skip
"""All parameters, also those that DeepSpeed would leave whole because they are small; what is not in use waits on the
CPU."""
LEARNT = {"edit": "qwen", "student": "qwen", "whole": "sd3", "whole_student": "sd3"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Iterator[dict[str, Path]]:
    """Run folders of one process with whole weights, and of two that share them."""
    import qwen_image_21
    import sd3

    alone = tmp_path_factory.mktemp("stock")
    qwen_image_21.build(alone / "qwen")
    sd3.build(alone / "sd3")
    (alone / "bright.py").write_text(REWARD)
    (alone / "recipe.yaml").write_text(RECIPE)
    for name, size in (("wide", (96, 64)), ("high", (64, 96))):
        Image.new("RGB", size, (200, 30, 90)).save(alone / f"{name}.png")
    edits = [{"prompt": f"make it {name}", "sources": [f"{name}.png"]} for name in ("wide", "high")]
    edits.append({"prompt": "put one beside the other", "sources": ["wide.png", "high.png"]})
    drawn = [{"prompt": f"a {colour} fox"} for colour in ("green", "grey", "white")]
    for name, lines in (("t2i", drawn), ("edit", edits)):
        (alone / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shared = alone.with_name("shared")
    shutil.copytree(alone, shared)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    pids = [
        forks.start("run", "recipe.yaml", *SHARDED, cwd=shared, rank=(rank, 2, port), says=f"says-{rank}.txt")
        for rank in (0, 1)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(alone)
        patch.setenv("HOME", str(alone))
        assert main(["run", "recipe.yaml"]) == 0
    statuses = forks.wait(*pids, seconds=900)
    assert statuses == [0, 0], "\n".join((shared / f"says-{rank}.txt").read_text() for rank in (0, 1))
    yield {"alone": alone / "runs" / "recipe", "shared": shared / "runs" / "recipe"}
    shutil.rmtree(shared)


@pytest.mark.parametrize("stage", LEARNT)
def test_two_processes_that_share_the_weights_learn_what_one_learns(stage: str, runs: dict[str, Path]) -> None:
    one, two = (load_file(run / stage / "weights.safetensors") for run in runs.values())
    assert one.keys() == two.keys()
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    facts = [json.loads((run / stage / "manifest.json").read_text())["result"] for run in runs.values()]
    assert min(fact["relative_change"] for fact in facts) > 1e-3
    assert apart < 1e-4, "a step of the optimiser is 1e-3"
    logs = [[json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
            for run in runs.values()]  # fmt: skip
    for a, b in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "reward/composite", "probe/kl", "probe/edit", "probe/t2i"):
            assert (name in a) == (name in b)
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=2e-3, abs=1e-5), name


def test_a_checkpoint_holds_what_is_trained_whole(runs: dict[str, Path]) -> None:
    """With LoRA its matrices, else every parameter as diffusers has it."""
    for stage, model in LEARNT.items():
        policy = load_file(max((runs["shared"] / stage / "checkpoints").iterdir()) / "policy.safetensors")
        if model == "qwen":
            assert all("lora" in name for name in policy)
            continue
        base = load_file(runs["alone"].parents[1] / model / "transformer" / "diffusion_pytorch_model.safetensors")
        assert policy and policy.keys() <= base.keys()
        assert all(value.shape == base[name].shape for name, value in policy.items())


def test_compiling_what_comes_layer_by_layer_is_warned_about_once(runs: dict[str, Path]) -> None:
    path = runs["alone"].parents[1] / "recipe.yaml"

    def warnings(*overrides: str) -> list[str]:
        recipe = load_recipe(path, overrides)
        return [said for said in check_combinations(recipe, open_registry(recipe)) if "compil" in said]

    (said,) = warnings(*SHARDED, "adapter.with.compile=true")
    assert said.startswith("command line: adapter.with.compile: compiling takes minutes and hardly helps")
    assert warnings(*SHARDED) == []
    assert warnings("engine.zero_stage=2", "adapter.with.compile=true") == []
