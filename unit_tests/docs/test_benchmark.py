"""The benchmark compares like with like: it refuses when the framework and the floor do not do the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = "--engine local --rewards free --prompts 4 --group 3 --solver-steps 3 --updates 2 --repeats 1"


@pytest.mark.parametrize(("task", "batch"), [("t2i", "6"), ("edit", "24")], ids=["in-parts", "joined-branches"])
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
    assert measured["network_calls"] > 0
    assert measured["wall_ratio"]["median"] > 0
