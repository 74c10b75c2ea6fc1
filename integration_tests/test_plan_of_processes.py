"""What `velatura check --world-size 2` says that a stage keeps where is what two real processes keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORKER, RECIPE = (Path(__file__).parent / name for name in ("plan_worker.py", "recipes/launched.yaml"))
STAGES = (1, 2)
CLOSE = 0.15
"""The error that a plan may have."""
DIVIDED = {"masters in fp32", "moments of adamw"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> list[dict[str, dict[str, tuple[int, int]]]]:
    """Of each process: ZeRO stage -> part -> bytes planned and found."""
    folder = tmp_path_factory.mktemp("memory")
    pids = forks.start_all("script", WORKER, RECIPE, folder, *STAGES, cwd=folder, processes=2)
    assert forks.wait(*pids, seconds=600) == [0, 0], (folder / "says.txt").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_keeps_what_the_plan_says(found: list[dict[str, dict[str, tuple[int, int]]]], stage: int) -> None:
    for own in found:
        parts = own[str(stage)]
        assert {"transformer weights", "weights of role old", *DIVIDED} <= parts.keys()
        for name, (planned, there) in parts.items():
            assert there > 0, name
            assert abs(planned / there - 1) <= CLOSE, f"{name}: planned {planned:,}, found {there:,}"


def test_two_processes_keep_half_of_what_zero_divides(found: list[dict[str, dict[str, tuple[int, int]]]]) -> None:
    for own in found:
        parts = own["1"]
        weights = parts["transformer weights"][1]
        assert parts["masters in fp32"][1] == pytest.approx(weights / 2, rel=0.01)
        assert parts["moments of adamw"][1] == pytest.approx(weights, rel=0.01)
