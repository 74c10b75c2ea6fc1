"""`velatura rewards bench`: what is measured, on which pictures, and what it says of a training step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "judge"))

import chat_server as serving

from velatura.core.cli import main

Make = Callable[..., Any]
CODE = """
import time

shown = []


def slow(images, prompts):
    shown.append((images, prompts))
    time.sleep(0.01 * len(images))
    return [0.5] * len(images)


def half(image, prompt):
    return 0.5 if prompt.category == "single" else 1 / 0


def silent(image, prompt):
    return None


def like_its_source(image, prompt):
    return float((image - prompt.sources[0]).abs().mean() < 0.05)


def size(image, prompt):
    assert tuple(image.shape) == (3, 24, 24), image.shape
    assert image.min() >= 0 and image.max() <= 1
    return 1.0
"""


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Make:
    """The numbers of a recipe with these rewards, and what was printed; or the message."""
    (tmp_path / "rewards.py").write_text(CODE)
    numbers = tmp_path / "bench.json"

    def run(*rewards: Any, task: str = "t2i", arguments: tuple[str, ...] = (), status: int = 0) -> Any:
        categories = {"t2i": ["portrait", "single"], "edit": ["recolour", "hair"]}[task]
        recipe = {
            "engine": {"kind": "local", "device": "cpu"},
            "adapter": {"use": "tinyworld", "with": {"weights": None, "width": 48, "heads": 3, "layers": 2}},
            "sampling": {"steps": 3, "batch": 32},
            "guidance": {"use": "rollout-only", "with": {"scale": 2.0}},
            "stages": {
                "teacher": {
                    "stage": "rl", "rewards": list(rewards), "prompts_per_step": 6, "group_size": 4,
                    "task": {"use": "tinyworld", "with": {"task": task, "count": 40, "categories": categories}},
                }
            },
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        assert main(["rewards", "bench", str(path), "--calls", "4", "--json", str(numbers), *arguments]) == status
        said = capsys.readouterr()
        return (json.loads(numbers.read_text()), said.out) if status == 0 else said.err

    return run


def function(call: str, **more: Any) -> dict[str, Any]:
    return {"use": "function", "name": call, "with": {"file": "./rewards.py", "call": call} | more}


def test_times_are_those_of_the_reward_and_a_step_is_all_its_pictures(bench: Make) -> None:
    numbers, said = bench(function("slow", batch=True))
    (row,) = numbers["rewards"]
    assert (row["calls"], row["batch"]) == (4, 16)  # a guided forward of 32 rows draws four groups of four
    assert 0.16 <= row["p50"] <= row["p95"]
    assert row["pictures_per_second"] == pytest.approx(16 * row["calls_per_second"])
    assert row["pictures_per_second"] <= 100
    assert row["pictures_per_step"] == 24
    assert row["seconds_per_step"] == pytest.approx(24 / row["pictures_per_second"])
    assert (row["failed"], row["not_applicable"]) == (0, 0)
    assert "slow" in said


def test_rewards_of_a_stage_are_summed_up(bench: Make) -> None:
    numbers, said = bench(function("slow", batch=True), function("silent"), arguments=("--batch", "2"))
    slow, silent = numbers["rewards"]
    together = numbers["stages"]["teacher"]
    assert together["seconds_per_step_beside"] == slow["seconds_per_step"]
    assert together["seconds_per_step_after"] == pytest.approx(slow["seconds_per_step"] + silent["seconds_per_step"])
    assert slow["batch"] == 2
    assert silent["not_applicable"] == 1
    assert "teacher: " in said


def test_failures_are_a_rate_with_a_reason_and_never_end_the_bench(bench: Make) -> None:
    numbers, said = bench(function("half"))
    (row,) = numbers["rewards"]
    assert 0 < row["failed"] < 1
    assert row["reason"].startswith("ZeroDivisionError")
    assert "% failed, the last: ZeroDivisionError" in said


def test_pictures_of_edits_are_like_their_sources(bench: Make, tmp_path: Path) -> None:
    numbers, _ = bench(function("like_its_source"), task="edit")
    assert numbers["rewards"][0]["failed"] == 0
    numbers, _ = bench(function("slow", batch=True), task="edit")
    shown = sys.modules["velatura_file_rewards"].shown
    for images, prompts in shown:
        assert all((i - p.sources[0]).abs().mean() < 0.05 for i, p in zip(images, prompts, strict=True))
    assert not any((a == b).all() for images, _ in shown for a in images for b in images if a is not b)


def test_random_pictures_have_the_size_of_the_adapter(bench: Make) -> None:
    numbers, _ = bench(function("size"))
    assert (numbers["rewards"][0]["failed"], numbers["rewards"][0]["not_applicable"]) == (0, 0)


def test_a_reward_counts_only_for_the_prompts_it_is_asked_about(bench: Make) -> None:
    portrait = {"use": "tinyworld-portrait", "name": "portrait", "weight": 0.0, "weight_by_category": {"portrait": 1.0}}
    numbers, said = bench(portrait, {"use": "tinyworld-instruction", "name": "edits"}, function("silent"))
    rows = {row["reward"]: row for row in numbers["rewards"]}
    assert 0 < rows["portrait"]["pictures_per_step"] < 24
    assert rows["portrait"]["failed"] == rows["portrait"]["not_applicable"] == 0
    assert rows["edits"] == {"stage": "teacher", "reward": "edits", "calls": 0}
    assert "teacher, edits: applies to none of the prompts" in said


def test_tokens_of_a_judge_are_those_that_its_server_counts_and_have_a_price(bench: Make) -> None:
    counted = serving.Raw(json.dumps(
        json.loads(serving.scored(serving.probabilities(0.5)).body)
        | {"usage": {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}}
    ).encode())  # fmt: skip
    with serving.ChatServer(lambda question: counted) as server:
        options = {"rubric": "alignment", "model": serving.MODEL, "server": server.address}
        judge = {"use": "vlm-judge", "name": "judge", "with": options}
        prices = ("--batch", "3", "--prompt-price", "2", "--completion-price", "10")
        numbers, said = bench(judge, function("slow", batch=True), arguments=prices)
        asked = len(server.questions)
    row, plain = numbers["rewards"]
    assert asked == 1 + 3 * 5  # a first question, one call to warm up, four that count
    assert (row["prompt_tokens"], row["completion_tokens"]) == (1000, 50)
    assert row["cost_per_step"] == pytest.approx(24 * (1000 * 2 + 50 * 10) / 1e6)
    assert "1,000 + 50" in said
    assert (plain["prompt_tokens"], plain["cost_per_step"]) == (None, None)
    assert "'-1' is no price" in bench(function("slow"), arguments=("--prompt-price=-1",), status=2)


def test_a_judge_whose_server_counts_nothing_has_no_tokens_and_no_cost(bench: Make) -> None:
    with serving.ChatServer() as server:
        options = {"rubric": "alignment", "model": serving.MODEL, "server": server.address}
        numbers, _ = bench({"use": "vlm-judge", "with": options}, arguments=("--batch", "2", "--prompt-price", "2"))
    (row,) = numbers["rewards"]
    assert (row["prompt_tokens"], row["completion_tokens"], row["cost_per_step"]) == (None, None, None)


def test_what_cannot_be_measured_is_said(bench: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = bench(function("slow"), arguments=("--stage", "techer"), status=2)
    assert "no stage is called 'techer'. Did you mean 'teacher'?" in said
    assert "there is no 'slwo'" in bench(function("slwo"), status=2)
    assert "'0' is no number from 1" in bench(function("slow"), arguments=("--calls", "0"), status=2)
    assert "no device is called 'gpu'" in bench(function("slow"), arguments=("--device", "gpu"), status=2)
