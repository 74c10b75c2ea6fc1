"""Two processes with nothing above them that would end one when the other ends: however the second one ends, the first
ends too, soon, and one message names the cause."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("watch_worker.py")
PATIENCE = 8
"""Seconds without a sign of life that they allow each other."""
CASES = {
    "slow": None,
    "stands-still": "has been at one thing for",
    "frozen": "has not been heard of for",
    "killed": "has not been heard of for",
    "message": "says: stages.x: the disk is full.",
    "bug": "failed: ZeroDivisionError: a mistake of ours",
}
"""How the second process ends -> what the first says of it."""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, int], tuple[int, int]], Path]:
    """(case, rank) -> exit status and seconds; and what each said."""
    folder = tmp_path_factory.mktemp("watch")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), "240", str(PATIENCE), *CASES, "same"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True, text=True, timeout=280, check=True,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(case, int(rank)): (int(status), int(seconds)) for case, rank, status, seconds in lines}, folder


Endings = tuple[dict[tuple[str, int], tuple[int, int]], Path]


@pytest.mark.parametrize("case", [case for case, said in CASES.items() if said])
def test_all_end_and_the_first_cause_is_named(endings: Endings, case: str) -> None:
    found, folder = endings
    assert found[case, 0][0] in (2, 3)
    said = (folder / f"{case}-0").read_text()
    assert said.startswith("velatura: process 1 on ")
    assert CASES[case] in said  # type: ignore[operator]
    assert said.count("velatura: ") == said.count("\n") == 1
    assert "goes on from the last checkpoint" in said
    assert str(folder / "logs" / "process-1.log") in said


def test_the_second_process_leaves_the_message_to_the_first(endings: Endings) -> None:
    found, folder = endings
    assert found["stands-still", 1][0] == 2
    assert found["message", 1][0] == 3
    assert found["killed", 1][0] == -9
    assert ("frozen", 1) not in found, "nothing but a signal ends a frozen process"
    assert all((folder / f"{case}-1").read_text() == "" for case in ("stands-still", "message", "killed", "frozen"))


def test_what_stands_still_is_told_by_what_it_was_at(endings: Endings) -> None:
    found = re.search(r"at one thing for (\d+) s: ([\w ]+)", (endings[1] / "stands-still-0").read_text())
    assert found and int(found[1]) >= PATIENCE and found[2] == "a thing that never ends"
    assert "It was last at: what follows step 2" in (endings[1] / "frozen-0").read_text()


def test_work_that_goes_on_may_take_longer_than_the_time_out(endings: Endings) -> None:
    found, folder = endings
    assert (found["slow", 0][0], found["slow", 1][0]) == (0, 0)
    assert found["slow", 0][1] > PATIENCE
    assert (folder / "slow-0").read_text() == (folder / "slow-1").read_text() == ""


def test_what_all_find_wrong_is_said_once(endings: Endings) -> None:
    said = "".join((endings[1] / f"same-{rank}").read_text() for rank in (0, 1))
    assert said.count("velatura: ") == 1
    assert "all find the same" in said
