"""What a recipe says of a judge's care reaches it: kept scores, a golden set, the breaker, threads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_server as serving
import pytest
import torch
import yaml
from PIL import Image

from velatura.core.errors import RewardError
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry
from velatura.core.stages.common import StageRun
from velatura.rewards.judge.rubric import shipped_rubric

Make = Callable[..., Any]


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., StageRun]:
    """A stage whose one reward is a judge behind a server, with a rubric of its own."""
    content = yaml.safe_load(shipped_rubric("alignment").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))

    def make(server: Any, **care: Any) -> StageRun:
        given = {"rubric": "mine.yaml", "model": serving.MODEL, "server": server.address, "backoff": 0.001}
        rl = {
            "stage": "rl", "task": {"use": "tinyworld"}, "adapter": {"use": "tinyworld"},
            "rewards": [{"use": "vlm-judge", "name": "judge", "with": given, **care}],
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"stages": {"teach": rl}}))
        recipe = load_recipe(path)
        return StageRun(
            name="teach", config=recipe.stage("teach"), recipe=recipe, registry=Registry.discover(),
            folder=tmp_path / "run" / "teach", run_folder=tmp_path / "run", seed=0, device=torch.device("cpu"),
            base=tmp_path,
        )  # fmt: skip

    return make


def scores(run: StageRun, made: list[Any]) -> list[float]:
    with run.judge(run.config.rewards, 0.0) as judge:
        judge.submit(made)
        report = judge.report([made[0].prompt])
    assert report.valid.all()
    return [float(score) for score in report.scores.flatten()]


def test_a_judge_is_asked_once_in_a_run_and_again_after_its_rubric_changed(
    serve: Make, stage: Make, pictures: Make, tmp_path: Path
) -> None:
    server, made = serve(), pictures([0.2, 0.8])
    first = scores(stage(server), made)
    asked = len(server.questions)
    assert scores(stage(server, breaker={"after": 3}), made) == first
    assert len(server.questions) == asked + 1  # the first question of a judge, about a grey picture
    rubric = tmp_path / "mine.yaml"
    rubric.write_text(rubric.read_text().replace("version: 1", "version: 2"))
    scores(stage(server), made)
    assert len(server.questions) == 2 * asked + 1
    scores(stage(server, cache=False), made)
    assert len(server.questions) == 3 * asked + 1


def test_a_server_with_another_mind_is_found_out_before_the_first_picture(
    serve: Make, stage: Make, pictures: Make, tmp_path: Path
) -> None:
    for name, level in (("dark", 20), ("light", 240)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{name}.png")
    rows = [
        {"image": f"{n}.png", "prompt": "a wall", "order": "walls", "place": p} for n, p in (("light", 1), ("dark", 2))
    ]
    (tmp_path / "golden.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server = serve()
    run = stage(server, golden={"file": "golden.jsonl"})
    assert len(scores(run, pictures([0.5]))) == 1
    server.behaviour = lambda q: serving.scored(serving.probabilities(1 - q.brightness))
    with pytest.raises(
        RewardError, match=r"recipe\.yaml:\d+: stages\.teach\.rewards\.0: reward 'judge' fails its golden"
    ):
        scores(run, pictures([0.5]))
