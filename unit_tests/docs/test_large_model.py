"""The benchmark of a large model, on a tiny one: it runs a step of both stages and counts what it says it counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_of_a_large_model_runs_on_a_tiny_one(tmp_path):
    out = tmp_path / "out.json"
    command = f"benchmarks/large_model.py --tiny --sizes 64 --sources 1 --json {out}"
    result = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(out.read_text())
    # 2 prompts x 2 samples in 2 steps with 2 branches, then a point of each under three weight sets
    assert found["rl"]["rows"] == found["rl unshared"]["rows"] == 16 + 3 * 4
    target, prefix = 16, 32 + 16
    assert found["rl unshared"]["tokens"] == 28 * (target + prefix)
    assert found["rl"]["tokens"] < found["rl unshared"]["tokens"]
    assert 0 < found["rl"]["update_flops"] < found["rl unshared"]["update_flops"]
    for stage in ("rl", "distill", "rl unshared"):
        assert found[stage]["rollout"] > 0
        assert found[stage]["update"] > 0
        assert found[stage]["peak_bytes"] > 1e7
        assert found[stage]["update_flops"] / found[stage]["update"] < found["peak_flops_per_s"]
    assert "MFU" in result.stdout
