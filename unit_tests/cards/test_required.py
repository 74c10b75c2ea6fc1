"""Training on an opinion takes a card that passes and is about this very reward, or the word that there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import simulated

from velatura.core.base_settings import Ref
from velatura.core.build import open_registry
from velatura.core.cards.file import write_card
from velatura.core.cards.identity import digest_of, identity_of
from velatura.core.cards.required import as_data
from velatura.core.check import check_combinations
from velatura.core.errors import RecipeError
from velatura.core.recipe import load_recipe
from velatura.core.report import build_report

REWARD = {"use": "sim/contrast", "name": "looks", "with": {"noise": 0.1}}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """A recipe that trains on the simulated reward."""

    def make(reward: dict[str, Any] | None = None, **stage: Any) -> Path:
        (tmp_path / "sim.py").write_text(simulated.PLUGIN)
        teacher = {"stage": "rl", "task": "tinyworld", "rewards": [{**REWARD, **(reward or {})}], **stage}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"plugins": ["sim.py"], "adapter": "tinyworld", "stages": {"teacher": teacher}}))
        return path

    return make


def warnings(path: Path) -> list[str]:
    loaded = load_recipe(path)
    return check_combinations(loaded, open_registry(loaded))


def refused(path: Path) -> str:
    with pytest.raises(RecipeError) as error:
        warnings(path)
    return str(error.value)


def card(path: Path, *, passed: bool = True, **options: Any) -> dict[str, Any]:
    """A card of the reward with these options, as the command writes it, less its measures."""
    loaded = load_recipe(path)
    ref = Ref.model_validate({"use": "sim/contrast", "with": {"noise": 0.1, **options}})
    identity = identity_of(open_registry(loaded), ref, path.parent)
    failed = {"name": "test-retest", "wanted": "ICC at least 0.8", "found": "0.4", "outcome": "failed", "why": ""}
    made = {"format": 1, "identity": identity, "fingerprint": digest_of(identity), "passed": passed,
            "criteria": [] if passed else [failed]}  # fmt: skip
    write_card(path.parent / "cards" / "looks", made, "<!doctype html>")
    return made


def test_without_a_card_the_recipe_is_refused_with_what_to_do(recipe):
    path = recipe()
    said = refused(path)
    assert said.startswith(f"{path}:")
    assert "stages.teacher.rewards.0: reward 'looks' (sim/contrast) is an opinion" in said
    assert f"velatura reward-card {path} --reward looks --stage teacher --ratings RATINGS.jsonl" in said
    assert "allow_unvalidated_reward: true" in said
    assert len(said.splitlines()) == 1


def test_with_the_word_for_it_there_is_a_warning(recipe):
    (said,) = warnings(recipe(allow_unvalidated_reward=True))
    assert "reward 'looks' trains under allow_unvalidated_reward: it has no reward card" in said


def test_a_passing_card_of_this_reward_is_enough_also_where_it_runs_differently(recipe):
    path = recipe({"card": "cards/looks"})
    card(path)
    assert warnings(path) == []
    faster = {**REWARD["with"], "speed": 7}
    assert warnings(recipe({"card": "cards/looks/card.json", "with": faster})) == []


def test_a_card_of_another_reward_is_an_error_that_says_what_differs(recipe):
    path = recipe({"card": "cards/looks"}, allow_unvalidated_reward=True)
    card(path, noise=0.3)
    said = refused(path)
    assert "stages.teacher.rewards.0.card" in said
    assert "option noise was 0.3 and is 0.1" in said


def test_a_changed_plugin_is_another_reward(recipe, tmp_path):
    path = recipe({"card": "cards/looks"})
    card(path)
    assert warnings(path) == []
    (tmp_path / "sim.py").write_text(simulated.PLUGIN.replace("0.1 for s", "0.2 for s"))
    assert "version was " in refused(path)


def test_a_card_that_does_not_pass_is_no_card(recipe):
    path = recipe({"card": "cards/looks"})
    card(path, passed=False)
    assert "its card cards/looks does not pass (test-retest: 0.4, wanted ICC at least 0.8)" in refused(path)
    assert len(warnings(recipe({"card": "cards/looks"}, allow_unvalidated_reward=True))) == 1


@pytest.mark.parametrize(("content", "message"), [(None, "there is no reward card at"), ("{", "is no reward card"),
                                                  ("{}", "is no reward card that this version reads")])  # fmt: skip
def test_what_is_no_card_is_told(recipe, tmp_path, content, message):
    path = recipe({"card": "card.json"})
    if content is not None:
        (tmp_path / "card.json").write_text(content)
    said = refused(path)
    assert message in said
    assert "velatura reward-card" in said


def test_verifiers_and_rewards_that_are_only_watched_need_none(recipe):
    assert warnings(recipe({"use": "tinyworld-alignment", "with": {}})) == []
    path = recipe()
    data = yaml.safe_load(path.read_text())
    data["stages"]["teacher"]["rewards"] = [{**REWARD, "weight": 0.0}, "tinyworld-alignment"]
    path.write_text(yaml.safe_dump(data))
    assert warnings(path) == []


@pytest.mark.parametrize(("use", "options"), [
    ("vlm-judge", {"rubric": "alignment", "model": "m"}), ("vlm-pairs", {"rubric": "alignment", "model": "m"}),
    ("pickscore", {}), ("clip-score", {}), ("http", {"server": "http://x:1", "reward": "r", "needs_card": True}),
])  # fmt: skip
def test_judges_and_learned_rewards_need_one(recipe, use, options):
    assert f"reward 'looks' ({use}) is an opinion" in refused(recipe({"use": use, "with": options}))


def test_the_identity_of_a_judge_holds_its_rubric_and_not_its_server(tmp_path):
    registry = open_registry(load_recipe(Path(__file__).parents[2] / "recipes" / "tinyworld.yaml"))
    given = {"rubric": "alignment", "model": "judge", "server": "http://a:1/v1", "timeout": 3}
    first = identity_of(registry, Ref.model_validate({"use": "vlm-judge", "with": given}), tmp_path)
    assert {"component", "version", "option model", "option rubric", "option min_mass", "rubric content"} <= set(first)
    moved = given | {"server": "http://b:2/v1", "timeout": 9}
    assert identity_of(registry, Ref.model_validate({"use": "vlm-judge", "with": moved}), tmp_path) == first
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    local = Ref.model_validate({"use": "vlm-judge", "with": {"rubric": "alignment", "model": "model"}})
    before = identity_of(registry, local, tmp_path)
    (folder / "config.json").write_text('{"layers": 2}')
    assert identity_of(registry, local, tmp_path)["option model"] != before["option model"]


def test_neither_card_nor_word_is_an_input_of_a_stage(recipe):
    plain = load_recipe(recipe()).resolved()
    assert load_recipe(recipe({"card": "cards/looks"}, allow_unvalidated_reward=True)).resolved() == plain


def test_report_and_closing_say_which_rewards_were_not_validated(recipe, tmp_path, capsys):
    from rich.console import Console

    from velatura.core.closing import close

    path = recipe(allow_unvalidated_reward=True)
    loaded = load_recipe(path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(path.read_text())
    resolved = {"recipe": loaded.resolved(), "cards": as_data(loaded, open_registry(loaded))}
    (run / "resolved.json").write_text(json.dumps(resolved))
    sentence = "teacher was trained on 'looks' (sim/contrast) without a passing reward card: it has no reward card."
    assert sentence.replace("'", "&#39;") in build_report(run).read_text()
    close(run, Console(width=200))
    assert sentence in capsys.readouterr().out
    card(recipe({"card": "cards/looks"}))
    loaded = load_recipe(path)
    (run / "resolved.json").write_text(json.dumps({**resolved, "cards": as_data(loaded, open_registry(loaded))}))
    page = build_report(run).read_text()
    assert "without a passing reward card" not in page
    assert "<td>passes</td>" in page


def test_a_reward_whose_weight_is_calibrated_trains_whatever_weight_it_has_in_the_stage(recipe):
    path = recipe()
    data = yaml.safe_load(path.read_text())
    rl = data["stages"]["teacher"]
    rl |= {"rewards": [{**REWARD, "weight": 0.0}], "weights_from": "weigh"}
    data["stages"]["weigh"] = {
        "stage": "calibrate", "task": "tinyworld", "rewards": [{**REWARD, "weight": 0.0}],
        "budgets": {"default": {"looks": 1.0}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    assert "reward 'looks' (sim/contrast) is an opinion" in refused(path)
    rl["rewards"].append("tinyworld-alignment")
    data["stages"]["weigh"] |= {"rewards": ["tinyworld-alignment"], "budgets": {"default": {"tinyworld-alignment": 1}}}
    path.write_text(yaml.safe_dump(data))
    assert warnings(path) == []
