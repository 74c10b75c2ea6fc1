"""Who may train a policy: a reward that is an opinion needs a card that passes, or the word that there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from velatura.core.build import build
from velatura.core.cards.file import read_card, require_same, why_not
from velatura.core.cards.identity import digest_of, identity_of
from velatura.core.components import RewardModel
from velatura.core.errors import RecipeError
from velatura.core.recipe import Recipe
from velatura.core.registry import Registry
from velatura.core.reward_settings import RewardRef
from velatura.core.settings import RLStage


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One reward that trains a policy and needs a card."""

    stage: str
    reward: str
    use: str
    at: str
    """Where the recipe names it."""
    fingerprint: str
    card: str | None
    """As the recipe names it."""
    passes: bool
    why: str
    """Why it does not; empty when it does."""


def standings(recipe: Recipe, registry: Registry) -> list[Standing]:
    """Every such reward of every rl stage.

    Raises:
        RecipeError: a card is missing where one is named, or about another reward.
    """
    return [found for name in recipe.order() for found in _of_stage(recipe, registry, name)]


def check_cards(recipe: Recipe, registry: Registry, name: str) -> list[str]:
    """Warnings about rewards of a stage that may train without a card.

    Raises:
        RecipeError: one may not.
    """
    stage = recipe.stage(name)
    if not isinstance(stage, RLStage):
        return []
    found = [each for each in _of_stage(recipe, registry, name) if not each.passes]
    if found and not stage.allow_unvalidated_reward:
        raise RecipeError("\n".join(_refusal(recipe, each) for each in found))
    return [
        f"{each.at}: reward '{each.reward}' trains under allow_unvalidated_reward: {each.why}. Reports say so."
        for each in found
    ]


def as_data(recipe: Recipe, registry: Registry) -> list[dict[str, Any]]:
    """The same for `resolved.json`, from which reports are made."""
    return [asdict(each) for each in standings(recipe, registry)]


def _of_stage(recipe: Recipe, registry: Registry, name: str) -> Iterator[Standing]:
    stage = recipe.stage(name)
    if not isinstance(stage, RLStage):
        return
    source: Any = recipe.stage(stage.weights_from) if stage.weights_from is not None else None
    calibrated = (
        {ref.label for ref in source.rewards} if source is not None else set()
    )  # whatever weight they have here
    for index, ref in enumerate(stage.rewards):
        at = recipe.at(("stages", name, "rewards", index))
        model = build(registry, "reward", ref, at)
        trains = ref.label in calibrated or ref.weight > 0 or any(w > 0 for w in ref.weight_by_category.values())
        if isinstance(model, RewardModel) and (ref.card is not None or (trains and model.needs_card())):
            yield _standing(recipe, registry, name, ref, at)


def _standing(recipe: Recipe, registry: Registry, name: str, ref: RewardRef, at: str) -> Standing:
    opened = ref.opened(Path(recipe.output or ""))
    identity, why = identity_of(registry, opened, recipe.folder.resolve()), "it has no reward card"
    if ref.judge is not None and not Path(str(opened.with_["path"])).is_dir():
        why = _no_judge_yet(recipe, name, ref.judge)
    elif ref.card is not None:
        place = f"{at}.card"
        card = read_card(recipe.folder / ref.card, place)
        require_same(card, identity, place)
        reasons = why_not(card)
        why = f"its card {ref.card} does not pass ({reasons})" if reasons else ""
    return Standing(
        stage=name, reward=ref.label, use=ref.use, at=at, fingerprint=digest_of(identity), card=ref.card,
        passes=not why, why=why,
    )  # fmt: skip


def _no_judge_yet(recipe: Recipe, name: str, judge: str) -> str:
    return (
        f"its judge is yet to be made, so no card can be about it (first 'velatura run {recipe.file} --stage {judge} "
        f"stages.{name}.allow_unvalidated_reward=true')"
    )


def _refusal(recipe: Recipe, found: Standing) -> str:
    command = (
        f"velatura reward-card {recipe.file} --reward {found.reward} --stage {found.stage} --ratings RATINGS.jsonl "
        f"--out cards/{found.reward}"
    )
    return (
        f"{found.at}: reward '{found.reward}' ({found.use}) is an opinion, prompted or learned, and {found.why}, so "
        f"nothing says that people share it. Make a card with '{command}' and name it here as 'card: "
        f"cards/{found.reward}', or set 'allow_unvalidated_reward: true' in stage '{found.stage}'; every report then "
        f"says so."
    )
