"""What a checkpoint holds beside tensors, in runs that are killed and go on: a tracker's id, and whose pupil one is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).with_name("recipes") / "kill.yaml"
TRACKED = ("plugins=[./tracker.py]", "stages.teacher.observers=[tracker]")
AMONG_OTHERS = ("plugins=[./tracker.py]", "stages.teacher.observers=[tensorboard, tracker]")
KILL = {"do": "kill", "at": "velatura.core.stages.training:Training.save", "call": 4}
"""Amid the fourth of six steps' checkpoints."""
OTHER_TEACHER = "stages.teacher.optimizer.lr=0.02"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Path:
    """A folder with the recipe, and its first stage done."""
    folder = tmp_path_factory.mktemp("remembered")
    for name in ("kill.yaml", "tracker.py"):
        shutil.copy(RECIPE.with_name(name), folder / name)
    assert forks.run("stage", "kill.yaml", "curate", cwd=folder) == 0
    return folder


def said(folder: Path) -> str:
    """What has been said since somebody asked last."""
    text = (folder / "says.txt").read_text()
    (folder / "says.txt").unlink()
    return text


def told(folder: Path) -> list[dict[str, Any]]:
    """What the tracker was told."""
    return [json.loads(line) for line in (folder / "runs/kill/teacher/tracker.jsonl").read_text().splitlines()]


def test_a_tracker_keeps_the_id_of_a_run_that_was_killed(folder: Path, forks: Any) -> None:
    """Also where there are other observers by then. Who watches changes nothing, so the stage is the same."""
    teacher = ("stage", "kill.yaml", "teacher")
    assert forks.run(*teacher, *TRACKED, cwd=folder, faults=[KILL]) == -9
    (first,) = {line["id"] for line in told(folder)}
    assert [line.get("step", -1) for line in told(folder)] == [-1, 0, 1, 2, 3]
    with (folder / "tracker.py").open("a") as file:
        file.write("\n# mended since\n")
    assert forks.run(*teacher, *AMONG_OTHERS, cwd=folder) == 0
    assert {line["id"] for line in told(folder)} == {first}
    assert told(folder)[5:] == [{"id": first, **what} for what in ({"start": 3}, *({"step": i} for i in (3, 4, 5)),
                                                                   {"end": 6})]  # fmt: skip
    shutil.rmtree(folder / "runs" / "kill" / "teacher")
    assert forks.run(*teacher, *TRACKED, cwd=folder) == 0
    assert {line["id"] for line in told(folder)} != {first}, "a run that begins anew is another one"


def test_a_student_does_not_go_on_under_other_teachers(folder: Path, forks: Any) -> None:
    """Also where the manifest, which would have put the student aside, is gone."""
    student, run = ("stage", "kill.yaml", "student"), folder / "runs" / "kill"
    assert forks.run("stage", "kill.yaml", "teacher", cwd=folder) == 0
    assert forks.run(*student, cwd=folder, faults=[KILL]) == -9
    before = sorted((run / "student" / "checkpoints").iterdir())
    assert forks.run("stage", "kill.yaml", "teacher", OTHER_TEACHER, cwd=folder) == 0
    (run / "student" / "manifest.json").unlink()
    said(folder)
    assert forks.run(*student, OTHER_TEACHER, cwd=folder) == 2
    (message,) = [line for line in said(folder).splitlines() if line.startswith("velatura: ")]
    assert "the checkpoint at step 3 in " in message
    assert "was made with teachers {'t2i': '" in message and "and now there is {'t2i': '" in message
    assert message.endswith("or do the stage again: velatura run RECIPE --stage student --fresh")
    assert sorted((run / "student" / "checkpoints").iterdir()) == before
    assert forks.run("run", "kill.yaml", OTHER_TEACHER, "--stage", "student", "--fresh", cwd=folder) == 0, said(folder)
