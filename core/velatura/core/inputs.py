"""What a stage's result depends on besides its own options, and what of it changed since it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velatura.core.fingerprint import file_hash, lasting_options, pictures_hash, reward_fingerprint, texts
from velatura.core.judge_settings import JudgeFitStage
from velatura.core.recipe import content_hash
from velatura.core.settings import ExportStage

if TYPE_CHECKING:
    from velatura.core.pipeline import Plan
    from velatura.core.registry import Registry

BASE_WEIGHTS = "weights of the base"
"""What the adapter of a stage starts from, wherever that lies."""
CARE = ("cache", "threads", "breaker", "golden")
"""The same of a reward in it."""
REWARDS = ("rewards", "guards", "raters", "truth")
"""Slots of a stage that hold rewards."""
ABSENT = content_hash(None)
"""An option that is null is one that is left out, also of a recipe from before there was such an option."""


def lasting(registry: Registry, key: str, value: Any) -> Any:
    """An option without how its rewards are looked after, where they run and how fast: no score depends on that."""
    return [_lasting_reward(registry, reward) for reward in value] if key in REWARDS else value


def _lasting_reward(registry: Registry, reward: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: item for name, item in reward.items() if name not in CARE}
    if kept.get("with"):
        operational = getattr(registry.get("reward", kept["use"]), "operational", ())
        kept["with"] = lasting_options(kept["with"], operational)
    return kept


def prompt_tasks(plan: Plan, name: str) -> dict[str, Any]:
    """The tasks behind a stage's prompts, its own or those of the stages that chose them."""
    tasks = plan.recipe.tasks_of(name).items()
    return {route: ref.model_dump(mode="json", by_alias=True) for route, ref in tasks}


def file_inputs(plan: Plan, name: str) -> dict[str, str]:
    """Content of the files that a stage's options name, of the weights its adapter starts from, and of its rewards.

    No key says where a clone or a package lies, so that what was moved is not done again.
    """
    config = plan.recipe.stage(name)
    stage = {key: lasting(plan.registry, key, value) for key, value in plan.resolved["stages"][name].items()}
    named = sorted({text for text in texts([stage, prompt_tasks(plan, name)]) if (plan.base / text).is_file()})
    found = {f"file {text}": file_hash(plan.base / text) for text in named}
    for text in named:
        if text.endswith(".jsonl") and (pictures := pictures_hash(plan.base / text, plan.base)):
            found[f"pictures of {text}"] = pictures
    from velatura.core.check import set_up

    if isinstance(config, JudgeFitStage):
        started = set_up(plan, "judge_model", config.judge_model).fingerprint()
        return found | {"what the judge starts from": started}
    if isinstance(config, ExportStage):
        return found
    adapter: Any = set_up(plan, "adapter", config.adapter)
    weights = Path(str(adapter.describe().get("weights", "")))
    if known := adapter.fingerprint():
        found[BASE_WEIGHTS] = known
    elif weights.is_file() and not any((plan.base / text).samefile(weights) for text in named):
        found[BASE_WEIGHTS] = file_hash(weights)
    return found | _reward_inputs(plan, config)


def _reward_inputs(plan: Plan, config: Any) -> dict[str, str]:
    """A fingerprint of each reward of a stage; of one whose judge is made by a stage that stage's result tells."""
    from velatura.core.served import recipe_context

    found = [(slot, number, ref) for slot in REWARDS for number, ref in enumerate(getattr(config, slot, []))]
    asked = [each for each in found if each[2].judge is None]
    context = recipe_context(plan, None) if asked else None
    return {
        f"reward {ref.label}" if slot == "rewards" else f"reward {slot}.{number} {ref.label}": reward_fingerprint(
            plan.registry, ref, context
        )
        for slot, number, ref in asked
        if context
    }


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The inputs that changed, by name."""
    known = {key: value for key, value in before.items() if not _lies_elsewhere(key, value, now)}
    if not any(key.startswith("reward ") for key in known):  # from before rewards had fingerprints
        now = {key: value for key, value in now.items() if not key.startswith("reward ")}
    if BASE_WEIGHTS in now and BASE_WEIGHTS not in known and len(known) < len(before):
        known[BASE_WEIGHTS] = now[BASE_WEIGHTS]
    return sorted(key for key in {*known, *now} if known.get(key, ABSENT) != now.get(key, ABSENT))


def _lies_elsewhere(key: str, value: str, now: Mapping[str, str]) -> bool:
    """Whether an input of an earlier version names the weights of the base, unchanged, by where they lay."""
    at = key.removeprefix("file ")
    return at != key and Path(at).is_absolute() and key not in now and now.get(BASE_WEIGHTS) == value
