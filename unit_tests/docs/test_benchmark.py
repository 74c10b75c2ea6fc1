"""The benchmark compares like with like: it refuses when the framework and the floor do not do the same work."""

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
def test_framework_and_floor_call_the_network_alike(task, batch, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "benchmarks/rl_step.py", *SMALL.split()),
            *("--task", task, "--batch", batch, "--json", str(tmp_path / "out.json")),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (measured,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert measured["network_calls"] == measured["floor_network_calls"] > 0
    ratio = measured["cpu_ratio_of_fastest"]
    assert math.isfinite(ratio)
    assert 0.3 < ratio < 3
