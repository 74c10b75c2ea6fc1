"""The shipped recipe, cut down, with a judge behind HTTP as its reward, through the whole command."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "unit_tests" / "judge"))

import chat_server as serving
from chat_server import ChatServer, Question, Raw, expectation

ROOT = Path(__file__).parents[1]
Run = Callable[..., Any]
STEPS, PROMPTS, GROUP = 2, 3, 4


def recipe(folder: Path, address: str) -> Path:
    """RL on text-to-image and RL on edits, a step or two each; judges are all the rewards there are."""
    shipped = yaml.safe_load((ROOT / "recipes" / "tinyworld.yaml").read_text())
    where = {"server": address, "model": serving.MODEL, "backoff": 0.01, "retries": 12}
    judges = {
        "t2i": [("alignment", 1.0), ("aesthetics", 0.5)],
        "edit": [("edit-instruction", 1.0), ("edit-quality", 0.5)],
    }
    stages = {}
    for task, rubrics in judges.items():
        rewards = [
            {"use": "vlm-judge", "name": rubric, "weight": weight, "with": {"rubric": rubric, **where}}
            for rubric, weight in rubrics
        ]
        small = {"steps": STEPS, "prompts_per_step": PROMPTS, "group_size": GROUP, "updates_per_step": 1,
                 "allow_unvalidated_reward": True}  # fmt: skip
        stage = shipped["stages"][f"teacher_{task}"] | small | {"rewards": rewards}
        del stage["prompts"]
        stages[f"teacher_{task}"] = stage | {"task": {"use": "tinyworld", "with": {"task": task, "count": 8}}}
    engine = shipped["engine"] | {"threads": 1}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(shipped | {"engine": engine, "stages": stages, "observers": []}))
    return path


def flaky() -> serving.Behaviour:
    """Three requests in ten fail, each in its own way."""
    draw, lock = random.Random(1), threading.Lock()
    faults = [Raw(b"overloaded", status=503), Raw(b'{"choices": [{'), Raw(b"", status=429)]

    def answer(question: Question) -> Raw:
        with lock:
            luck = draw.random()
        return faults[int(luck * 10)] if luck < 0.3 else serving.by_brightness(question)

    return answer


def test_a_policy_is_trained_on_what_a_judge_behind_http_says(tmp_path: Path, velatura: Run) -> None:
    """A third of the requests fail, and no score is lost or made up."""
    with ChatServer(flaky()) as server:
        done = velatura("run", recipe(tmp_path, server.address), cwd=tmp_path)
        questions = server.questions
    assert "alignment" in done.stdout + done.stderr
    unvalidated = "teacher_t2i was trained on 'alignment' (vlm-judge) without a passing reward card"
    assert unvalidated in " ".join(done.stdout.split())
    assert unvalidated.replace("'", "&#39;") in (tmp_path / "runs" / "recipe" / "report.html").read_text()
    runs = tmp_path / "runs" / "recipe"
    for task, rubric in (("t2i", "alignment"), ("edit", "edit-instruction")):
        rows = [json.loads(line) for line in (runs / f"teacher_{task}" / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == STEPS
        assert all(row[f"reward/{rubric}/failed"] == 0 and row["updated"] == 1 for row in rows)
        assert all(row["reward/spread_within_group"] > 0 and row["grad_norm"] > 0 for row in rows)
        shown = {q.parts[-2]["image_url"]["url"]: q.brightness for q in questions if is_about(q, rubric)}
        assert len(shown) == STEPS * PROMPTS * GROUP
        said = sum(row[f"reward/{rubric}/mean"] for row in rows) / STEPS
        assert said == pytest.approx(sum(map(expectation, shown.values())) / len(shown), abs=1e-4)
    assert len(questions) > 1.2 * 4 * STEPS * PROMPTS * GROUP


def is_about(question: Question, rubric: str) -> bool:
    """Whether it is a question of that rubric about a picture of the run, not the first one about a grey picture."""
    line = {"alignment": "what its prompt asked for", "edit-instruction": "what its instruction makes of"}[rubric]
    return line in question.parts[0]["text"] and "a grey gradient" not in json.dumps(question.parts[1:])


def test_a_judge_that_dies_stops_the_run_with_its_reason(tmp_path: Path, velatura: Run) -> None:
    def dying(question: Question) -> Raw:
        return serving.by_brightness(question) if question.number < 20 else Raw(b"CUDA error", status=400)

    with ChatServer(dying) as server:
        done = velatura("run", recipe(tmp_path, server.address), cwd=tmp_path, status=2)
    said = " ".join(done.stderr.split())
    assert "gave no score for" in said
    assert "answered with status 400: CUDA error" in said
