"""Files that people write beside recipes answer mistakes as recipes do: file, line, key, what to give, what is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from velatura.core.ablation.settings import load_ablation
from velatura.core.cards.ratings import read_ratings
from velatura.core.errors import VelaturaError
from velatura.core.golden import GoldenSet
from velatura.core.preferences import read_pairs
from velatura.core.ratings import RatingFile
from velatura.core.reward_settings import Golden
from velatura.plugins.tasks.prompt_file import read_prompts
from velatura.rewards.judge.rubric import SHIPPED, load_rubric

SHIPPED_ABLATION = Path(__file__).parents[2] / "recipes" / "ablations" / "guidance.yaml"


def golden(path: Path) -> object:
    return GoldenSet.load(Golden(file=path.name), path.parent)


READ: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "prompts": (lambda path: read_prompts(path, "t2i"), {"prompt": "a fox", "size": [64, 64]}),
    "ratings": (
        lambda path: RatingFile(path, "looks", (1, 2, 3, 4, 5)),
        {"image": "0.png", "prompt": "a fox", "dimension": "looks", "ratings": [4, 5]},
    ),
    "pairs": (lambda path: read_pairs(path, ["p"]), {"prompt": "p", "a": "0.png", "b": "0.png", "preferred": "a"}),
    "card": (read_ratings, {"prompt": "a fox", "image": "0.png", "ratings": {"ann": 4}}),
    "golden": (golden, {"prompt": "a fox", "image": "0.png", "low": 0.5}),
}
"""What reads each kind of JSONL file, and a line that it takes."""
WRONG = [
    ("prompts", {"size": [64]}, "size.1: the list ends too early: item 2 is missing"),
    ("prompts", {"size": [64, 0]}, "size.1: give 1 or more (got 0)"),
    ("prompts", {"size": [64, 64, 3]}, "size: give at most 2 (got [64, 64, 3])"),
    ("prompts", {"size": 64}, "size: this is a list: write [...], also for a single item (got 64)"),
    ("prompts", {"sources": "0.png"}, "sources: this is a list: write [...], also for a single item (got '0.png')"),
    ("prompts", {"category": None}, 'category: give text in double quotes, like "so" (got null)'),
    ("prompts", {"metadata": [1]}, 'metadata: this is an object: write {"NAME": VALUE} (got [1])'),
    ("ratings", {"truth": "high"}, "truth: give a number (got 'high')"),
    ("ratings", {"ratings": 4}, "ratings: this is a list: write [...], also for a single item (got 4)"),
    ("ratings", {"dimension": ""}, "dimension: give text with a length of at least 1 (got '')"),
    ("ratings", {"raionale": "x"}, "raionale: no such key. Did you mean 'rationale'?"),
    ("pairs", {"preferred": "tied"}, "preferred: give 'a', 'b' or 'tie' (got 'tied'). Did you mean 'tie'?"),
    ("pairs", {"prefered": "a"}, "prefered: no such key. Did you mean 'preferred'?"),
    ("pairs", {"a": False}, 'a: give text in double quotes, like "so" (got false)'),
    ("card", {"ratings": {"ann": 6}}, "ratings.ann: give 5 or less (got 6)"),
    ("card", {"split": "tset"}, "split: give 'train', 'calibration' or 'test' (got 'tset'). Did you mean 'test'?"),
    ("card", {"metadata": "x"}, """metadata: this is an object: write {"NAME": VALUE} (got 'x')"""),
    ("golden", {"low": "much"}, "low: give a number (got 'much')"),
    ("golden", {"place": 0, "order": "a"}, "place: give 1 or more (got 0)"),
    ("golden", {"lwo": 0.1}, "lwo: no such key. Did you mean 'low'?"),
]


def said(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(VelaturaError) as caught:
        read(path)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    return tmp_path / "lines.jsonl"


@pytest.mark.parametrize(("kind", "change", "message"), WRONG)
def test_a_wrong_value(kind: str, change: dict[str, Any], message: str, path: Path) -> None:
    read, good = READ[kind]
    path.write_text(f"{json.dumps(good)}\n")
    read(path)
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(good | change)}\n")
    assert said(read, path) == f"lines.jsonl:3: {message}"


@pytest.mark.parametrize("kind", READ)
def test_a_line_that_is_no_object(kind: str, path: Path) -> None:
    read, good = READ[kind]
    for raw, message in (
        ("{", "this is not JSON: Expecting property name enclosed in double quotes (column 2)"),
        ("[1]", "this is a list, not an object"),
        ("null", "this is null, not an object"),
        ("7", "this is a number, not an object"),
    ):
        path.write_text(f"{json.dumps(good)}\n{raw}\n")
        told, _, like = said(read, path).partition(". Write a line like ")
        assert told == f"lines.jsonl:2: {message}"
        assert isinstance(json.loads(like), dict)


def test_the_key_that_is_missing_is_told_with_its_meaning(path: Path) -> None:
    path.write_text('{"prompt": "p", "a": "0.png", "preferred": "a"}\n')
    assert said(READ["pairs"][0], path) == "lines.jsonl:1: b: this key is missing: Another."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: text-to-image", "task: video", "own.yaml:3: task: give 'text-to-image', 'edit' or 'any' (got 'video')"),
        ("criteria:", "critera:", "own.yaml:5: critera: no such key. Did you mean 'criteria'?"),
        ("version: 1", "version: one", "own.yaml:2: version: give a whole number (got 'one')"),
        ("version: 1", "version: 0", "own.yaml:2: version: give 1 or more (got 0)"),
        ("version: 1", "name: twice", "own.yaml:2: name is written twice, first on line 1"),
        ("version: 1", "version: [", "own.yaml:4: this is not YAML: "),
    ],
)
def test_a_wrong_rubric(old: str, new: str, message: str, tmp_path: Path) -> None:
    content = yaml.safe_load((SHIPPED / "alignment.yaml").read_text()) | {"version": 1, "task": "text-to-image"}
    path = tmp_path / "own.yaml"
    order = ("name", "version", "task", "role", "criteria", "levels")
    text = yaml.safe_dump({key: content[key] for key in order}, sort_keys=False, width=10_000)
    path.write_text(text)
    load_rubric(path)
    assert old in text
    path.write_text(text.replace(old, new))
    assert said(load_rubric, path).startswith(message)


def test_a_rubric_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "kindness.yaml").write_text("")
    assert "kindnes.yaml. Did you mean 'kindness.yaml'? Shipped ones are named without a path: aesthetics, " in said(
        load_rubric, tmp_path / "kindnes.yaml"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, -1]}, "ab.yaml: seeds.1: give 0 or more (got -1)"),
        ({"arm": {}}, "ab.yaml: arm: no such key. Did you mean 'arms'?"),
        ({"metrics": "gold"}, "ab.yaml: metrics: this is a list: write [...], also for a single item (got 'gold')"),
    ],
)
def test_a_wrong_ablation(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "ab.yaml"
    content = {**yaml.safe_load(SHIPPED_ABLATION.read_text()), **change}
    path.write_text(yaml.safe_dump(content))
    lines = path.read_text().splitlines()
    number = next(n for n, line in enumerate(lines, start=1) if line.startswith(f"{next(iter(change))}:"))
    number += 2 if "seeds" in change else 0
    assert said(load_ablation, path).splitlines()[0] == message.replace("ab.yaml:", f"ab.yaml:{number}:")


def test_an_ablation_that_is_no_mapping_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "ab.yaml"
    path.write_text("- a\n")
    assert said(load_ablation, path) == "ab.yaml: an ablation file is a mapping, this is a list"
    assert "there is no ablation file" in said(load_ablation, tmp_path / "bb.yaml")
    assert "Did you mean 'ab.yaml'?" in said(load_ablation, tmp_path / "bb.yaml")
