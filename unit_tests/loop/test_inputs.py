"""What a finished stage is compared by: content, never the place where a clone or a package lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from velatura.api import Context
from velatura.core.cards.identity import identity_of
from velatura.core.fingerprint import files_hash, reward_fingerprint
from velatura.core.inputs import BASE_WEIGHTS, difference, lasting
from velatura.core.pipeline import plan_run, stage_inputs
from velatura.core.recipe import Ref
from velatura.core.registry import Registry
from velatura.rewards.judge import rubric as rubrics
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.reward import VlmJudge

RECIPE = """\
engine: {kind: local, device: cpu}
adapter: {use: tinyworld}
stages:
  first:
    stage: rl
    task: {use: tinyworld, with: {task: t2i, count: 8}}
    rewards: [{use: vlm-judge, with: {rubric: RUBRIC, model: m, server: "http://localhost:1/v1"}}]
"""


def recipe(folder: Path, rubric: str = "alignment", change: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("RUBRIC", rubric).replace("model: m", f"model: m{change}"))
    return path


def inputs(path: Path) -> dict[str, str]:
    return stage_inputs(plan_run(path), "first")


def own_rubric(folder: Path, line: str) -> None:
    content = yaml.safe_load(rubrics.shipped_rubric("alignment").read_text())
    content["criteria"] = [line]
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))


def test_no_input_names_the_place_of_a_file_of_the_package(tmp_path: Path) -> None:
    one, other = inputs(recipe(tmp_path / "a")), inputs(recipe(tmp_path / "b"))
    assert one == other
    assert BASE_WEIGHTS in one
    assert not [key for key in one if "/" in key]


def test_a_run_from_before_that_was_so_is_not_done_again(tmp_path: Path) -> None:
    now = inputs(recipe(tmp_path))
    before = {key: value for key, value in now.items() if key != BASE_WEIGHTS and not key.startswith("reward ")}
    lay = "file /elsewhere/velatura/plugins/tinyworld/base.safetensors"
    assert difference(before | {lay: now[BASE_WEIGHTS]}, now) == []
    assert difference(before | {lay: "another content"}, now) == [lay, BASE_WEIGHTS]


def test_an_option_that_is_null_is_one_that_is_left_out(tmp_path: Path) -> None:
    now = inputs(recipe(tmp_path))
    without = {key: value for key, value in now.items() if key != "option prompt_filter"}
    assert difference(without, now) == []
    assert difference(now, now | {"option steps": "another"}) == ["option steps"]


def test_how_a_reward_is_looked_after_changes_no_result(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    now = inputs(path)
    (tmp_path / "golden.jsonl").write_text("{}")
    care = "cache: false, threads: 1, golden: {file: golden.jsonl}, breaker: {after: 2}"
    path.write_text(path.read_text().replace("{use: vlm-judge,", f"{{use: vlm-judge, {care},"))
    assert difference(now, inputs(path)) == []


def test_where_and_how_patiently_a_reward_is_asked_changes_no_result(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    now = inputs(path)
    text = path.read_text()
    path.write_text(
        text.replace("localhost:1/v1", "elsewhere:2/v1").replace("model: m", "model: m, timeout: 5, retries: 9")
    )
    assert "elsewhere" in path.read_text() and "timeout" in path.read_text()
    assert inputs(path) == now
    path.write_text(text.replace("model: m", "model: m, min_mass: 0.9"))
    assert difference(now, inputs(path)) == ["option rewards", "reward vlm-judge"]


OWN = """
import torch

from velatura.api import Options, RewardModel, Scores, hookimpl


class InnerOptions(Options):
    server: str = "http://a"
    model: str = "m"


class OuterOptions(Options):
    judge: InnerOptions = InnerOptions()
    threads: int = 1
    gain: float = 1.0


class Own(RewardModel[OuterOptions]):
    name = "own"
    operational = frozenset({"judge.server", "threads"})

    def score(self, samples):
        return Scores.of(torch.stack([sample.image.mean() for sample in samples]))


@hookimpl
def velatura_reward():
    return [Own]
"""


def test_one_notion_of_what_is_operational_serves_fingerprints_cards_and_inputs(tmp_path: Path) -> None:
    """Of an option within another, too, and of a reward that says nothing of its own but which those are."""
    (tmp_path / "mine.py").write_text(OWN)
    registry = Registry.empty()
    registry.add_file(tmp_path / "mine.py")
    context = Context(device=torch.device("cpu"), cache=tmp_path, seed=0, base=tmp_path)
    plain = {"judge": {"server": "http://a", "model": "m"}, "threads": 1, "gain": 1.0}
    moved = {**plain, "judge": {"server": "http://b", "model": "m"}, "threads": 2}
    louder, other = {**plain, "gain": 2.0}, {**plain, "judge": {"server": "http://a", "model": "n"}}

    def told(given: dict[str, Any]) -> tuple[Any, ...]:
        ref = Ref.model_validate({"use": "mine/own", "with": given})
        data = [{"use": "mine/own", "with": given, "cache": True}]
        return (
            reward_fingerprint(registry, ref, context), identity_of(registry, ref, tmp_path),
            lasting(registry, "rewards", data),
        )  # fmt: skip

    assert told(plain) == told(moved)
    assert all(a != b for a, b in zip(told(plain), told(louder), strict=True))
    assert all(a != b for a, b in zip(told(plain), told(other), strict=True))


def test_a_changed_picture_is_another_input_wherever_a_file_of_prompts_names_it(tmp_path: Path) -> None:
    (tmp_path / "edits").mkdir()
    for name in ("edits/a.png", "edits/b.png", "mask.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    long = "make it " + "very " * 80 + "red"
    rows = [
        {"prompt": long, "sources": ["a.png"]},
        {"prompt": "x", "sources": ["b.png"], "metadata": {"m": "mask.png"}},
    ]
    (tmp_path / "edits" / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = recipe(tmp_path)
    task = "{use: prompts, with: {file: edits/edits.jsonl, task: edit}}"
    text = path.read_text().replace("{use: tinyworld, with: {task: t2i, count: 8}}", task)
    path.write_text(text.replace("alignment", "edit-instruction"))
    before = inputs(path)
    for name in ("edits/b.png", "mask.png"):
        Image.new("RGB", (5, 5)).save(tmp_path / name)
        now = inputs(path)
        assert difference(before, now) == ["pictures of edits/edits.jsonl"]
        before = now


def test_an_option_too_long_for_a_name_of_a_file_is_no_file(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace("timeout", "").replace("model: m", f"model: {'m' * 500}"))
    assert inputs(path)


def test_an_edited_rubric_is_another_input(tmp_path: Path) -> None:
    path = recipe(tmp_path, "mine.yaml")
    own_rubric(tmp_path, "All is there.")
    before = inputs(path)
    own_rubric(tmp_path, "All is there, and spelt right.")
    assert difference(before, inputs(path)) == ["file mine.yaml", "reward vlm-judge"]


def test_an_edited_rubric_of_the_package_is_another_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path / "recipe")
    before = inputs(path)
    shutil.copytree(rubrics.SHIPPED, tmp_path / "shipped")
    own_rubric(tmp_path, "All is there.")
    shutil.copy(tmp_path / "mine.yaml", tmp_path / "shipped" / "alignment.yaml")
    monkeypatch.setattr(rubrics, "SHIPPED", tmp_path / "shipped")
    assert difference(before, inputs(path)) == ["reward vlm-judge"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (", timeout: 5", True),
        (", server: 'http://other:1/v1', served_as: x", True),
        (", retries: 9, concurrency: 2", True),
        (", min_mass: 0.9", False),
    ],
)
def test_patience_is_no_part_of_a_fingerprint(tmp_path: Path, change: str, same: bool) -> None:
    context = Context(device=torch.device("cpu"), cache=tmp_path, seed=0, base=tmp_path)
    given = {"rubric": "alignment", "model": "m", "server": "http://localhost:1/v1"}
    other = given | dict(yaml.safe_load(f"{{a: 1{change}}}"))
    del other["a"]
    one, two = (VlmJudge(VlmJudgeOptions.model_validate(o)).fingerprint(context) for o in (given, other))
    assert (one == two) is same


def test_a_judge_whose_weights_change_has_another_fingerprint(tmp_path: Path) -> None:
    context = Context(device=torch.device("cpu"), cache=tmp_path, seed=0, base=tmp_path)
    (tmp_path / "judge").mkdir()
    weights = tmp_path / "judge" / "model.safetensors"
    weights.write_bytes(b"one")
    judge = VlmJudge(VlmJudgeOptions(rubric="alignment", model="judge"))
    before, folder = judge.fingerprint(context), files_hash(tmp_path / "judge")
    weights.write_bytes(b"other")
    assert judge.fingerprint(context) != before
    weights.rename(weights.with_name("renamed.safetensors"))
    assert files_hash(tmp_path / "judge") != folder
