"""docs/scaling.md says what its script computes, and its job script is one that works."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_simulation", ROOT / "benchmarks" / "scale_simulation.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["scale_simulation"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_script_computes(script: ModuleType) -> None:
    found = re.search(r"<!-- scale -->\n(.*)\n<!-- /scale -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == script.page(script.Assumptions()), "run python benchmarks/scale_simulation.py"
    assert (ROOT / "docs" / "images" / "scaling.svg").stat().st_size > 5000


def test_the_network_is_that_of_the_class(script: ModuleType) -> None:
    net = script.Network()
    with torch.device("meta"):
        real = QwenImage21Transformer2DModel()
    assert net.parameters == pytest.approx(sum(p.numel() for p in real.parameters()), rel=0.02)
    rank = net.rank
    low = sum(rank * (m.in_features + m.out_features) for name, m in real.named_modules()
              if re.search(r"attn\.to_(q|k|v|out\.0)$", name))  # fmt: skip
    assert net.low_rank == low
    assert net.width == real.inner_dim


def test_a_forward_costs_what_torch_counts(script: ModuleType) -> None:
    """On a small network of the same class: blocks, without the few layers around them."""
    tokens, words, width, layers = 1024, 64, 128, 2
    real = QwenImage21Transformer2DModel(
        in_channels=64, out_channels=64, num_attention_heads=8, attention_head_dim=16, num_layers=layers,
        context_in_dim=32, axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)  # fmt: skip
    slots = torch.tensor([False] * words + [True] * (tokens // 4))[None]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the others are not counted
        real(torch.randn(1, tokens, 64), torch.randn(1, words, 32), torch.full((1,), 0.5), [[(1, 32, 32)]], slots)
    counted = counter.get_total_flops()
    small = script.Network(layers=layers, width=width, target=tokens + words, prefix=0)
    assert small.row() == pytest.approx(counted, rel=0.1)


def test_messages_and_waiting_are_the_only_loss(script: ModuleType) -> None:
    given = script.Assumptions(spread=0.0, hop=0.0, python=0.0, report=0.0, judged=0.0, picture=0.0)
    net, load = script.Network(), script.Load(prompts=32)
    one = script.predict(net, script.Load(prompts=4), True, 1, 1, given)
    eight = script.predict(net, load, True, 1, 8, given)
    assert one.exchange == 0
    size = (script.FP32 + script.BF16) * net.parameters
    assert eight.seconds - one.seconds == pytest.approx(size * 7 / 8 / given.inside)
    assert eight.rollout == pytest.approx(4 * 16 * 40 * 2 * net.row() / (given.peak * given.forward_share))
    across = script.predict(net, script.Load(prompts=256), True, 1, 64, given)
    assert across.exchange == pytest.approx(size * 63 / 64 / given.between)
    ways = [script.exchange(net, load, True, stage, 8, given) for stage in (1, 2, 3)]
    assert ways[0] < ways[1] < ways[2]


def test_the_slowest_is_the_largest_of_normal_numbers(script: ModuleType) -> None:
    """What is waited grows with the logarithm of the number of processes; simulated."""
    load, net = script.Load(prompts=4 * 64), script.Network()
    step = script.predict(net, load, False, 1, 64, script.Assumptions())
    share = step.waits / (step.rollout + step.update)
    draws = 1 + 0.01 * torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert share == pytest.approx(float(draws.max(1).values.mean()) - 1, rel=0.25)


def test_the_measured_point_is_there(script: ModuleType) -> None:
    measured = json.loads(script.MEASURED.read_text())
    again = measured["alone"] + measured["messages"] / 2 / measured["rate"]
    again += measured["prompts"] * measured["group"] * measured["python"]
    assert math.isclose(again, measured["predicted"], rel_tol=1e-6)
    assert script.Assumptions().python >= 0.5 * measured["python"], (
        "what is assumed is not better than what was measured"
    )


def test_the_job_script_runs(tmp_path: Path) -> None:
    """With stand-ins for srun and scontrol: it begins where it was submitted, and goes back into the queue."""
    found = re.search(
        r"<!-- sbatch -->\n<!-- run by [^\n]*\n```bash\n(.*?)```\n<!-- /sbatch -->", PAGE.read_text(), re.DOTALL
    )
    assert found is not None
    (tmp_path / "job.sh").write_text(found[1])
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    for name, text in (("srun", 'echo "$PWD $OMP_NUM_THREADS $*"; exit $STATUS'), ("scontrol", 'echo "again: $*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["bash", "-n", "job.sh"], cwd=tmp_path, check=True)
    for status in (0, 2, 75):
        variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8"}
        done = subprocess.run(
            ["bash", str(tmp_path / "job.sh")], cwd="/", env={**os.environ, **variables, "STATUS": str(status)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        first, *more = done.stdout.splitlines()
        assert first == f"{tmp_path} 8 --kill-on-bad-exit=1 velatura run recipes/qwen-image-21.yaml"
        assert more == (["again: requeue 17"] if status == 75 else [])
        assert done.returncode == status
