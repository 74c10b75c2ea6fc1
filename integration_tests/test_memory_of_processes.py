"""What each of two real processes needs under ZeRO 1 and 2 is what was estimated for two, in counted bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

FAMILIES = Path(__file__).parent.parent / "unit_tests" / "adapters" / "families"
sys.path.insert(0, str(FAMILIES))
WORKER = Path(__file__).with_name("memory_worker.py")
CLOSE = 0.15
"""The error that an estimate may have."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> list[dict[str, dict[str, tuple[int, int]]]]:
    """Of each rank: case -> quantity -> estimate and count, from one launch."""
    import qwen_image_21

    folder = tmp_path_factory.mktemp("memory")
    qwen_image_21.build(folder / "model")
    pids = forks.start_all("script", WORKER, folder, cwd=folder, processes=2)
    assert forks.wait(*pids, seconds=500) == [0, 0], (folder / "says.txt").read_text()[-9000:]
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
