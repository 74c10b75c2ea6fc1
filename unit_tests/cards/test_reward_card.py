"""`velatura reward-card` on simulated raters: what was put in comes out, and what is bad fails."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import simulated

from velatura.core.cli import main

Card = Callable[..., Any]


@pytest.fixture
def card(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card of the simulated reward with these options, or the message."""
    monkeypatch.chdir(tmp_path)

    def make(*arguments: str, status: int = 0, reward: str = "sim/contrast") -> Any:
        given = ["reward-card", reward, "--file", "sim.py", "--label", "sim", "--ratings", "ratings.jsonl"]
        given += ["--bootstrap", "300", "--perturb", "24", "--batch", "64", *arguments]
        assert main(given) == status, capsys.readouterr()
        said = capsys.readouterr()
        return said.err if status == 2 else (json.loads((tmp_path / "cards/sim/card.json").read_text()), said.out)

    return make


def test_noise_and_error_that_were_put_in_are_found(card: Card, tmp_path: Path):
    """Quality has variance 1, the reward an error of 0.6, each of three raters errs one time in ten."""
    simulated.pairs_file(tmp_path, prompts=200, error=0.1)
    found, _ = card("noise=0.6", status=1)  # an ICC of 0.74 is not enough
    measures = found["measures"]
    e, sigma = 0.1, 0.6
    sign = 0.5 + math.asin(1 / math.sqrt(1 + sigma**2)) / math.pi  # of the reward and the truth
    majority = (1 - e) ** 3 + 3 * e * (1 - e) ** 2
    accuracy = measures["pairs"]["within-policy"]["half"]
    known = sign * majority + (1 - sign) * (1 - majority)
    assert accuracy["value"] == pytest.approx(known, abs=0.06)  # 300 pairs: two standard errors are 0.045
    assert accuracy["low"] < known < accuracy["high"]
    assert accuracy["method"] == "BCa"
    agree = (1 - e) ** 2 + e**2
    ceiling = ((1 - e) ** 3 + e**3) / agree
    assert measures["pairs"]["within-policy"]["ceiling"]["value"] == pytest.approx(ceiling, abs=0.03)
    assert measures["people"]["choices"]["value"] == pytest.approx(1 - 4 * e * (1 - e), abs=0.08)
    assert measures["retest"]["kind"] == "the same pictures again"
    assert measures["retest"]["sigma"] == pytest.approx(sigma, rel=0.1)
    assert measures["retest"]["icc"] == pytest.approx(1 / (1 + sigma**2), abs=0.06)
    assert measures["pairs"]["within-policy"]["ties"]["value"] == 0
    assert found["data"]["calibration_clusters"] + found["data"]["test_clusters"] == 200
    assert measures["cost"]["failed"] == 0
    assert {row["value"] for row in measures["slices"] if row["by"] == "category"} == {"light", "dark"}


def test_a_good_reward_passes_and_says_so_everywhere(card: Card, tmp_path: Path):
    simulated.pairs_file(tmp_path, prompts=120, error=0.1)
    found, said = card("noise=0.2")
    assert found["passed"], found["criteria"]
    assert found["holes"] == []
    assert {row["name"]: row["outcome"] for row in found["criteria"]}["both orders"] == "not applicable"
    assert {row["name"]: row["expected"] for row in found["measures"]["battery"]}["thumbnail"] == "any"
    assert "verdict  passed" in said
    page = (tmp_path / "cards/sim/card.html").read_text()
    assert "It passes" in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)


def test_a_reward_that_prefers_the_worse_fails_with_reasons(card: Card, tmp_path: Path):
    simulated.pairs_file(tmp_path, prompts=100, error=0.1)
    found, said = card("sign=-1", status=1)
    outcomes = {row["name"]: row["outcome"] for row in found["criteria"]}
    assert outcomes["pairwise accuracy"] == outcomes["selection"] == outcomes["categories"] == "failed"
    assert {"blank", "grey", "noise", "vignette"} <= set(found["holes"])  # it likes what shows nothing
    assert "not passed" in said
    assert "Known hole: blank" in (tmp_path / "cards/sim/card.html").read_text()


def test_pure_noise_fails_accuracy_and_test_retest(card: Card, tmp_path: Path):
    simulated.pairs_file(tmp_path, prompts=100, error=0.0)
    found, _ = card("sign=0", "noise=1", status=1)
    outcomes = {row["name"]: row["outcome"] for row in found["criteria"]}
    assert (
        outcomes["test-retest"] == outcomes["pairwise accuracy"] == outcomes["share of what raters reach"] == "failed"
    )
    assert abs(found["measures"]["retest"]["icc"]) < 0.2


def test_ratings_make_pairs_groups_and_correlations(card: Card, tmp_path: Path):
    simulated.ratings_file(tmp_path, prompts=60, group=4, noise=0.3)
    found, _ = card("noise=0.1")
    measures = found["measures"]
    assert measures["ratings"]["overall"]["spearman"]["value"] > 0.85
    assert 0.6 < measures["ratings"]["within"]["kendall"]["value"] < 1
    assert measures["ratings"]["affine"]["slope"] == pytest.approx(1, abs=0.2)
    assert measures["selection"]["value"] > 0.85
    assert measures["people"]["ratings"]["value"] > 0.7
    assert found["data"]["pairs"] == 60 * 6
    assert measures["ties"]["accuracy"]["value"] > 0.5
    assert measures["calibration"]["ece"]["value"] < 0.2


def test_a_deterministic_reward_is_retested_under_changes_that_keep_the_content(card: Card, tmp_path: Path):
    simulated.pairs_file(tmp_path, prompts=60, error=0.1)
    found, _ = card("--criterion", "min_pairs=40")
    retest = found["measures"]["retest"]
    assert retest["kind"].startswith("changes that keep the content")
    assert 0 < retest["sigma"] < 0.2
    assert retest["repeats"] == 5
    assert found["settings"]["criteria"]["min_pairs"] == 40


def test_a_perturbation_that_raises_the_sharpness_of_the_embedded_world_is_a_hole(card: Card, tmp_path: Path):
    simulated.pairs_file(tmp_path, prompts=40, error=0.1)
    found, _ = card(reward="tinyworld-sharpness", status=1)
    verdicts = {row["name"]: row["verdict"] for row in found["measures"]["battery"]}
    assert verdicts["grain"] == verdicts["oversharpened"] == verdicts["grid-8"] == verdicts["noise"] == "hole"
    assert verdicts["grey"] == verdicts["blank"] == "right"  # nothing is sharp there
    assert "grain" in found["holes"]
    assert {row["name"]: row["outcome"] for row in found["criteria"]}["perturbations"] == "failed"
    told, _ = card("--expect", "grain=any", reward="tinyworld-sharpness", status=1)
    assert "grain" not in told["holes"]


def test_failures_are_counted_and_never_scores(card: Card, tmp_path: Path):
    simulated.pairs_file(tmp_path, prompts=40, error=0.0)
    (tmp_path / "flaky.py").write_text(
        "def f(image, prompt):\n    v = float(image[:, :, :3].mean() - image[:, :, -3:].mean())\n"
        "    return v if prompt.text.endswith(tuple('0123456')) else 1 / 0\n"
    )
    found, _ = card("file=./flaky.py", "call=f", reward="function", status=1)
    cost, accuracy = found["measures"]["cost"], found["measures"]["pairs"]["within-policy"]["half"]
    assert cost["failed"] == pytest.approx(0.3, abs=0.05)
    assert cost["reasons"][0].startswith("ZeroDivisionError")
    assert accuracy["value"] > 0.97  # of those with a score; a few are equal in 8 bits
    assert accuracy["n"] < found["measures"]["pairs"]["within-policy"]["pairs"]
    assert {row["name"]: row["outcome"] for row in found["criteria"]}["failures"] == "failed"


def test_a_reward_of_a_recipe_is_found_by_its_name(card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    simulated.pairs_file(tmp_path, prompts=30, error=0.0)
    (tmp_path / "recipe.yaml").write_text(
        "plugins: [sim.py]\nadapter: tinyworld\nstages:\n  teacher:\n    stage: rl\n    task: tinyworld\n"
        "    rewards:\n      - {use: sim/contrast, name: looks, with: {noise: 0.1}}\n      - tinyworld-aesthetics\n"
    )
    given = ["--ratings", "ratings.jsonl", "--bootstrap", "50", "--perturb", "0", "--out", "here"]
    assert main(["rewards", "card", "recipe.yaml", *given]) == 1  # too few pairs, no battery
    found = json.loads((tmp_path / "here" / "card.json").read_text())
    assert found["reward"]["label"] == "looks"
    assert found["identity"]["option noise"] == "0.1"
    assert "option speed" not in found["identity"]
    capsys.readouterr()
    assert main(["reward-card", "recipe.yaml", "--reward", "lookz", *given]) == 2
    assert "no reward called 'lookz'. Did you mean 'looks'?" in capsys.readouterr().err


LINE = {"prompt": "p", "images": ["a.png", "b.png"], "choices": {"ann": "a"}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{**LINE, "choces": {}}], "ratings.jsonl:1: choces: no such key. Did you mean 'choices'?"),
        ([LINE, "{"], "ratings.jsonl:2: this is not JSON"),
        ([{**LINE, "images": ["a.png", "z.png"]}], "ratings.jsonl:1: there is no picture 'z.png'"),
        ([{**LINE, "choices": {}}], "nobody said anything"),
        ([{"prompt": "p", "image": "a.png", "ratings": {"ann": 7}}], "ratings.jsonl:1: ratings.ann: "),
        ([{**LINE, "image": "a.png"}], "give either 'image'"),
        ([{**LINE, "ratings": {"ann": 3}}], "'ratings' do not belong here"),
        ([LINE, LINE], "ratings.jsonl:2: rater 'ann' has answered this before"),
        ([{**LINE, "rater": "ben"}], "'choice' and 'rater' belong together"),
        ([{**LINE, "split": "test"}, {**LINE, "choices": {"b": "a"}, "split": "train"}], "must not be measured apart"),
        ([{**LINE, "split": "train"}], "nothing is left to measure on"),
        ([{**LINE, "images": ["a.png", "a.png"]}], "both pictures are 'a.png'"),
        ([], "nothing is rated"),
    ],
)
def test_mistakes_in_ratings_are_told_with_their_line(card: Card, tmp_path: Path, lines: list, message: str):
    simulated.written(tmp_path, [])
    for name in ("a.png", "b.png"):
        simulated.draw(tmp_path / name, 3)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / "ratings.jsonl").write_text(text)
    assert message in card(status=2)


def test_mistakes_on_the_command_line_are_answered(card: Card, tmp_path: Path):
    simulated.pairs_file(tmp_path, prompts=4, error=0.0)
    assert "--criterion min_ic: no such criterion. Did you mean 'min_icc'?" in card("--criterion", "min_ic=1", status=2)
    assert "no perturbation is called 'gran'. Did you mean 'grain'?" in card("--expect", "gran=falls", status=2)
    assert "cannot be expected to 'fall'. Did you mean 'falls'?" in card("--expect", "grain=fall", status=2)
    (tmp_path / "0-0a.png").write_text("no picture")
    assert "0-0a.png cannot be read as a picture" in card(status=2)
    (tmp_path / "ratings.jsonl").rename(tmp_path / "rating.jsonl")
    assert "there is no file of ratings 'ratings.jsonl'. Did you mean 'rating.jsonl'?" in card(status=2)


def test_a_pair_asked_the_other_way_round_is_the_same_pair(card: Card, tmp_path: Path):
    from velatura.core.cards.ratings import read_ratings

    for name in ("a.png", "b.png"):
        simulated.draw(tmp_path / name, 3)
    turned = {**LINE, "images": ["b.png", "a.png"], "choices": {"ben": "a", "cid": "tie"}}
    (pair,) = read_ratings(simulated.written(tmp_path, [LINE, turned])).pairs
    assert pair.choices == {"ann": 1.0, "ben": -1.0, "cid": 0.0}
