"""What each of two real processes needs under ZeRO 1 and 2 is what was estimated for two, in counted bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAMILIES = Path(__file__).parent.parent / "unit_tests" / "adapters" / "families"
sys.path.insert(0, str(FAMILIES))
WORKER = Path(__file__).with_name("memory_worker.py")
CLOSE = 0.15
"""The error that an estimate may have."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, tuple[int, int]]]]:
    """Of each rank: case -> quantity -> estimate and count, from one launch."""
    import qwen_image_21

    folder = tmp_path_factory.mktemp("memory")
    qwen_image_21.build(folder / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_each_of_two_processes_needs_what_was_estimated(
    counted: list[dict[str, dict[str, tuple[int, int]]]],
) -> None:
    assert len(counted) == 2
    for rank, cases in enumerate(counted):
        assert len(cases) == 4
        for case, quantities in cases.items():
            for what, (estimate, found) in quantities.items():
                error = estimate / found - 1
                print(f"rank {rank}, {case}, {what}: estimate {estimate:,}, counted {found:,}: {error:+.1%}")
                assert abs(error) <= CLOSE, (rank, case, what)


def test_the_masters_and_moments_of_two_processes_are_halves(
    counted: list[dict[str, dict[str, tuple[int, int]]]],
) -> None:
    """43,088 parameters, of which each process keeps half: 4 bytes of master and 8 of moments."""
    for cases in counted:
        for case in ("zero 1, fp32, lora None", "zero 2, fp32, lora None", "zero 2, bf16, lora None"):
            assert cases[case]["masters"] == [43088 * 4 // 2] * 2
            assert cases[case]["moments"][0] == 43088 * 8 // 2
