"""Rubrics as files, and the options that name them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from velatura.api import Context, Prompt, Sample, VelaturaError
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.rubric import SHIPPED, Rubric, load_rubric, shipped_rubrics

NAMES = ("aesthetics", "alignment", "edit-instruction", "edit-quality", "portrait")


def test_these_rubrics_are_shipped() -> None:
    assert tuple(shipped_rubrics()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_rubric_has_a_sentence_for_every_level(name: str) -> None:
    rubric = load_rubric(SHIPPED / f"{name}.yaml")
    assert rubric.name == name
    assert list(rubric.levels) == [1, 2, 3, 4, 5]
    assert len(set(rubric.levels.values())) == 5
    assert all(text.endswith(".") and text.count(". ") == 0 for text in rubric.levels.values())
    assert rubric.criteria
    assert rubric.out_of_scope
    assert rubric.procedure


def test_instructions_hold_all_of_the_rubric_and_reasoning_comes_before_the_score() -> None:
    rubric = load_rubric(SHIPPED / "portrait.yaml")
    text = rubric.instructions(200)
    for part in (rubric.role, *rubric.criteria, *rubric.out_of_scope, *rubric.procedure, *rubric.levels.values()):
        assert part.strip() in text
    assert "asks for no person" in text
    assert text.index("First write your reasoning") < text.index("Then end with a line of its own: Score: [level]")
    assert "1, 2, 3, 4, 5, N/A" in text
    assert "reasoning" not in rubric.instructions(0)


def test_a_rubric_without_an_na_rule_offers_none() -> None:
    assert "N/A" not in load_rubric(SHIPPED / "alignment.yaml").instructions(100)


@pytest.mark.parametrize(
    ("task", "t2i", "edit"), [("any", True, True), ("edit", False, True), ("text-to-image", True, False)]
)
def test_a_rubric_is_for_edits_or_for_prompts_or_for_both(task: str, t2i: bool, edit: bool) -> None:
    rubric = load_rubric(SHIPPED / "aesthetics.yaml").model_copy(update={"task": task})
    assert rubric.applies(Prompt(id="a", text="x", task="t2i")) == t2i
    assert rubric.applies(Prompt(id="a", text="x", task="edit", sources=(torch.zeros(3, 4, 4),))) == edit


def test_the_question_names_several_sources_by_number() -> None:
    sources = (torch.zeros(3, 4, 4), torch.ones(3, 4, 4))
    prompt = Prompt(id="a", text="put both on a table", task="edit", sources=sources)
    parts = load_rubric(SHIPPED / "edit-quality.yaml").question(Sample(prompt=prompt, image=sources[0], seed=0), 0)
    assert [part for part in parts if isinstance(part, str)][1:3] == [
        "Source picture 1, before the edit:",
        "Source picture 2, before the edit:",
    ]


def test_a_change_of_a_rubric_changes_its_digest() -> None:
    rubric = load_rubric(SHIPPED / "alignment.yaml")
    assert rubric.digest != rubric.model_copy(update={"role": "You are somebody else."}).digest


def own(tmp_path: Path, **changes: Any) -> Path:
    content = yaml.safe_load((SHIPPED / "alignment.yaml").read_text()) | changes
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def test_a_rubric_of_ones_own_is_read_from_beside_the_recipe(
    tmp_path: Path, context: Context, serve: Callable[..., Any], judge: Callable[..., Any]
) -> None:
    own(tmp_path, name="kindness", task="any", levels={0: "Unkind.", 1: "Kind."})
    made = judge(serve(), "own.yaml", ready=False)
    made.setup(context)
    assert (made.rubric.name, list(made.rubric.levels)) == ("kindness", [0, 1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"levels": None}, "levels: this key is missing: What a picture of each level"),
        ({"levels": {1: "a", 3: "b"}}, "whole numbers in a row, lowest first"),
        ({"levels": {5: "a", 4: "b"}}, "lowest first"),
        ({"levels": {1: "a"}}, "two or more"),
        ({"levels": {-1: "a", 0: "b"}}, "must not be negative"),
        ({"out_of_scop": ["x"]}, "Did you mean 'out_of_scope'?"),
        ({"task": "video"}, "own.yaml:3: task: give 'text-to-image', 'edit' or 'any' (got 'video')"),
        ({"version": 0}, "version"),
        ({"criteria": []}, "criteria"),
    ],
)
def test_what_is_wrong_with_a_rubric_is_said_with_its_field(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = own(tmp_path, **changes)
    with pytest.raises(VelaturaError) as caught:
        load_rubric(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_rubric_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(VelaturaError, match=r"no rubric at .*gone\.yaml.*aesthetics, alignment"):
        load_rubric(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rubric": "alignmnet"}, "Did you mean 'alignment'?"),
        ({"server": "localhost:8000"}, "is no address; write it like http://localhost:8000/v1"),
        ({"concurrency": 4}, "concurrency: this is for a server, and none is given"),
        ({"server": "http://a/v1", "batch_size": 4}, "batch_size: this is for a model in this process"),
        ({"server": "http://a/v1", "request": {"n": 3}}, "request must not set n"),
    ],
)
def test_options_that_do_not_fit_are_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        VlmJudgeOptions.model_validate({"rubric": "alignment", "model": "m"} | options)
    assert said in str(caught.value)


@pytest.mark.parametrize("given", ["http://a:1/v1", "http://a:1/v1/", "http://a:1/v1/chat/completions"])
def test_an_address_may_be_written_in_several_ways(given: str) -> None:
    assert VlmJudgeOptions(rubric="alignment", model="m", server=given).server == "http://a:1/v1"


def test_importing_the_judge_imports_neither_transformers_nor_an_http_client() -> None:
    code = (
        "import sys, velatura.rewards.judge.reward as r; r.VlmJudge(r.VlmJudgeOptions(rubric='portrait', model='m'))"
        ".rubric; print([m for m in ('transformers', 'httpx2', 'httpcore2', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_rubric_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "vlm-judges.md"
    (block,) = re.findall(r"^```yml\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "typography.yaml").write_text(block)
    assert load_rubric(tmp_path / "typography.yaml").name == "typography"


def test_rubric_fields_are_described() -> None:
    assert all(field.description for field in Rubric.model_fields.values())
