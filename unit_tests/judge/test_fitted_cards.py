"""A reward card of a judge that a stage made: it is about what lies in that stage's folder, once it lies there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from velatura.api import Context
from velatura.core.build import open_registry
from velatura.core.cards.file import write_card
from velatura.core.cards.identity import digest_of
from velatura.core.cards.required import as_data, check_cards
from velatura.core.cards.subject import subject_of_recipe
from velatura.core.errors import RecipeError
from velatura.core.pipeline import Plan, _begin_stage, plan_run
from velatura.core.recipe import load_recipe
from velatura.rewards.judge.vlm import Vlm, VlmOptions

SMALL = {"width": 32, "vision_width": 32, "layers": 1, "vision_layers": 1, "patch": 4}
MODEL = {"rubric": "alignment", "min_mass": 0.0, "fresh": SMALL}


def written(folder: Path, **stage: Any) -> Path:
    reward = {"use": "vlm-judge", "name": "looks", "judge": "fit", "card": "cards/looks"}
    fit = {
        "stage": "judge-fit", "ratings": "ratings.jsonl", "dimension": "looks",
        "judge_model": {"use": "vlm", "with": MODEL},
    }  # fmt: skip
    rl = {"stage": "rl", "task": "tinyworld", "rewards": [reward], **stage}
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"adapter": "tinyworld", "output": str(folder / "run"), "stages": {"fit": fit, "rl": rl}})
    )
    return path


def fitted(context: Context, folder: Path, nudge: float = 0.0) -> None:
    """What the stage `fit` leaves."""
    model = Vlm(VlmOptions.model_validate(MODEL))
    model.setup(context)
    net = model.load(torch.device("cpu"))
    with torch.no_grad():
        next(net.parameters()).add_(nudge)
    model.save(net, folder / "run" / "fit" / "judge", {"dimension": "looks"})


def refused(plan: Plan) -> str:
    with pytest.raises(RecipeError) as error:
        check_cards(plan.recipe, plan.registry, "rl")
    return str(error.value)


def test_a_card_is_about_the_judge_in_the_run_and_falls_when_that_is_fitted_again(
    context: Context, tmp_path: Path
) -> None:
    plan = plan_run(written(tmp_path))
    fitted(context, tmp_path)
    identity = dict(subject_of_recipe(plan, None, None, "cpu").identity)
    assert identity["option path"].startswith("judge (")
    card = {"format": 1, "identity": identity, "fingerprint": digest_of(identity), "passed": True, "criteria": []}
    write_card(tmp_path / "cards" / "looks", card, "<!doctype html>")
    assert check_cards(plan.recipe, plan.registry, "rl") == []
    fitted(context, tmp_path, nudge=0.01)
    assert "option path was judge (" in refused(plan)
    with pytest.raises(RecipeError, match="option path was judge"):
        _begin_stage(plan, "rl", "2/2")  # where an earlier stage of the same run fitted it


def test_before_the_judge_is_made_no_card_passes_and_it_is_said_what_comes_first(tmp_path: Path) -> None:
    said = refused(plan_run(written(tmp_path)))
    assert "its judge is yet to be made, so no card can be about it" in said
    assert "--stage fit stages.rl.allow_unvalidated_reward=true'" in said
    recipe = load_recipe(written(tmp_path, allow_unvalidated_reward=True))
    (warning,) = check_cards(recipe, open_registry(recipe), "rl")
    assert "its judge is yet to be made" in warning
    (row,) = as_data(recipe, open_registry(recipe))
    assert not row["passes"]
