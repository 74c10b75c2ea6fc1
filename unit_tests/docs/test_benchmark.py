"""The benchmark compares like with like: it refuses when the framework and the floor do not do the same work."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = "--engine local --rewards free --prompts 4 --group 3 --solver-steps 3 --updates 2 --repeats 2"
CASES = {"in parts": ("t2i", "6"), "branches apart": ("t2i", "5"), "all at once": ("edit", "24")}


@pytest.mark.parametrize(("task", "batch"), CASES.values(), ids=CASES)
def test_framework_and_floor_call_the_network_alike(task, batch, tmp_path, monkeypatch):
    """In this process: starting one takes longer than the benchmark at this size."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    asked = ["--task", task, "--batch", batch, "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["rl_step.py", *SMALL.split(), *asked])
    importlib.import_module("rl_step").main()
    (measured,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert measured["network_calls"] == measured["floor_network_calls"] > 0
    ratio = measured["cpu_ratio_of_fastest"]
    assert math.isfinite(ratio)
    assert 0.3 < ratio < 3


def test_a_shared_prefix_saves_what_the_benchmark_says(tmp_path):
    """At the default proportions (half of an edit's sequence is its source) and a smaller network."""
    small = "--width 128 --layers 2 --side 16 --group 8 --steps 4 --points 8 --repeats 1"
    result = subprocess.run(
        [sys.executable, "benchmarks/shared_prefix.py", *small.split(), "--json", str(tmp_path / "out.json")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    rollout, update = found["edit rollout"], found["edit update"]
    target, prefix = 256, 256 + 32
    assert rollout["tokens"] == {"stock": 32 * (prefix + target), "shared": prefix + 32 * target}
    assert update["tokens"] == {"stock": 8 * (prefix + target), "shared": prefix + 8 * target}
    assert update["kept_bytes"]["stock"] > 1.6 * update["kept_bytes"]["shared"]
    for job, least in (
        (rollout, 1.4),
        (update, 1.2),
    ):  # 1.9 and 2.7 at full length; a busy machine may do worse
        assert job["seconds"]["stock"] > least * job["seconds"]["shared"]
