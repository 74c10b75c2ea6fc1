"""Reward cards of judges behind a server: both orders, tokens, groups."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "judge")]

import chat_server as serving
import simulated

from velatura.core.cli import main

Card = Callable[..., Any]


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card of a judge that answers like this."""
    monkeypatch.chdir(tmp_path)

    def make(use: str, behaviour: serving.Behaviour, *arguments: str) -> dict[str, Any]:
        given = ["rubric=aesthetics", f"model={serving.MODEL}", "reasoning_tokens=0", "retries=0"]
        given += ["--ratings", "ratings.jsonl", "--bootstrap", "100", "--label", "judge", *arguments]
        with serving.ChatServer(behaviour) as server:
            assert main(["reward-card", use, f"server={server.address}", *given]) in (0, 1)
        return json.loads((tmp_path / "cards/judge/card.json").read_text())

    return make


def contrast(picture: np.ndarray) -> float:
    return float(picture[:, 1:4].mean() - picture[:, -4:-1].mean()) / 255 / simulated.SCALE


def compared(bias: float) -> serving.Behaviour:
    """Levels around 3 + (second - first) - bias: the place of the first is worth `bias` levels."""

    def answer(question: serving.Question) -> serving.Raw:
        first, second = (contrast(picture) for picture in question.pictures[-2:])
        middle = 3 + (second - first) - bias
        weight = {str(level): math.exp(-2 * (level - middle) ** 2) for level in range(1, 6)}
        total = sum(weight.values())
        said = json.loads(serving.scored({level: w / total for level, w in weight.items()}).body)
        return serving.Raw(json.dumps(said | {"usage": {"prompt_tokens": 700, "completion_tokens": 9}}).encode())

    return answer


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_the_worth_of_the_first_place_is_found(card: Card, tmp_path: Path, bias: float):
    simulated.pairs_file(tmp_path, prompts=24, error=0.0)
    found = card("vlm-pairs", compared(bias), "--perturb", "4", "--repeats", "1")
    position = found["measures"]["position"]
    assert found["reward"]["scope"] == "group"
    assert found["measures"]["pairs"]["within-policy"]["half"]["value"] > 0.9  # both orders are asked for the score
    cost = found["measures"]["cost"]  # a pair is asked about in both orders; the look at the orders is not of its cost
    assert (cost["prompt_tokens"], cost["completion_tokens"]) == (700, 9)
    outcome = {row["name"]: row["outcome"] for row in found["criteria"]}["both orders"]
    if bias:
        assert position["bias"]["value"] > 0.3
        assert position["consistency"]["value"] < 0.75
        assert outcome == "failed"
    else:
        assert abs(position["bias"]["value"]) < 0.01
        assert position["consistency"]["value"] > 0.95
        assert outcome == "passed"
    blank = next(row for row in found["measures"]["battery"] if row["name"] == "blank")
    assert blank["verdict"] == "right"  # beside the picture itself it loses
    assert blank["change"]["value"] < 0


def test_tokens_and_failures_of_a_judge_stand_on_its_card(card: Card, tmp_path: Path):
    simulated.pairs_file(tmp_path, prompts=10, error=0.0)

    def answer(question: serving.Question) -> serving.Raw:
        if question.number % 10 == 3:
            return serving.Raw(b"no", status=400)
        body = json.loads(serving.scored(serving.probabilities(contrast(question.pictures[-1]) / 6)).body)
        return serving.Raw(json.dumps(body | {"usage": {"prompt_tokens": 700, "completion_tokens": 9}}).encode())

    found = card("vlm-judge", answer, "--perturb", "0")
    assert found["identity"]["rubric content"]
    assert found["reward"]["dimension"] == "aesthetics"
    cost = found["measures"]["cost"]
    assert 600 < cost["prompt_tokens"] <= 800
    assert cost["p95"] >= cost["p50"] > 0
    assert found["measures"]["retest"]["repeats"] in (3, 5)
    assert found["measures"]["pairs"]["within-policy"]["half"]["value"] > 0.9
    outcomes = {row["name"]: row["outcome"] for row in found["criteria"]}
    assert outcomes["perturbations"] == "not measured"
    assert not found["passed"]
