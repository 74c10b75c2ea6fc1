"""What a recipe may say of a stage that calibrates rewards. Data only; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from velatura.core.base_settings import Count, NotNegative, Positive, Ref, Settings, Share, only_one
from velatura.core.errors import suggest
from velatura.core.reward_settings import RewardRef
from velatura.core.settings import Sampling, group_of

DEFAULT = "default"
"""Budget of the categories that are not named."""


def mismatches(stages: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Stages whose rewards are not those of the calibrate stage that their weights come from."""
    for name, stage in stages.items():
        source = stages.get(getattr(stage, "weights_from", None) or "")
        if not isinstance(source, CalibrateStage):
            continue
        known = {reward.label: reward for reward in source.rewards}
        for index, reward in enumerate(stage.rewards):
            at, other = ("stages", name, "rewards", index), known.get(reward.label)
            if other is not None and (other.use, other.given) != (reward.use, reward.given):
                yield at, f"{reward.label!r} is not the reward that {stage.weights_from!r} calibrates under that name"
            if other is None and (reward.weight > 0 or any(w > 0 for w in reward.weight_by_category.values())):
                hint = suggest(reward.label, known)
                yield (
                    at,
                    f"{stage.weights_from!r} finds no weight for {reward.label!r}.{hint} With weight 0 it is watched",
                )
        here = {reward.label for reward in stage.rewards}
        for label in known:
            if label not in here:
                message = f"{stage.weights_from!r} finds a weight for {label!r}, which is no reward of this stage"
                yield ("stages", name, "weights_from"), message


class CalibrateStage(Settings):
    """Finds reward weights by category, under which each reward has its share of the advantage and none falls."""

    stage: Literal["calibrate"]
    adapter: Ref
    task: Ref | None = Field(None, description="Where prompts come from, when no curate stage chose them.")
    prompts: str | None = Field(None, description="The curate stage whose kept prompts are drawn.")
    guidance: Ref = Ref(use="rollout-only")
    kernel: Ref = Ref(use="ode")
    sampling: Sampling = Sampling()
    rewards: list[RewardRef] = Field(
        min_length=1, description="What gets a weight. The weights written here say nothing: they are what is sought."
    )
    guards: list[RewardRef] = Field(
        default_factory=list, description="Rewards that are not trained on, and that training must not push down."
    )
    budgets: dict[str, dict[str, Share]] = Field(
        min_length=1,
        description="Category -> reward -> share of the advantage's variance; shares of a category sum to 1. "
        "`default` is for categories that are not named.",
    )
    human_pairs: str | None = Field(
        None,
        description="JSONL file of preferences, seen from the recipe. Budgets are fitted to them where that holds on "
        "prompts left out; else they stay as written.",
    )
    model: str = Field("base", description="Whose samples are judged.")
    groups: Count = Field(200, description="Prompts per category, at most.")
    group_size: Annotated[int, Field(strict=True)] = Field(8, description="Samples per prompt.")
    repeats: Annotated[int, Field(strict=True, ge=2)] = Field(
        2, description="How often each sample is scored: what differs is the reward's noise."
    )
    prior_groups: Positive = Field(
        100.0, description="How many groups the correlations of all categories count for beside a category's own."
    )
    kappa: Annotated[float, Field(strict=True, ge=-1, lt=1)] = Field(
        0.05, description="Least correlation of the advantage with each reward and guard; -1 guards nothing."
    )
    bootstrap: Count = Field(200, description="Resamples for standard errors and intervals.")
    max_failed: Share = Field(0.05, description="Stop when a larger share of scores failed.")

    @field_validator("group_size")
    @classmethod
    def _compares(cls, value: int) -> int:
        return group_of(value, "calibration compares the samples of a prompt with each other")

    @model_validator(mode="after")
    def _one_origin_of_prompts(self) -> CalibrateStage:
        only_one(self, prompts="the name of a curate stage", task="a component")
        return self

    def budget_of(self, category: str) -> dict[str, float] | None:
        """Reward -> share in a category; None where there is no budget for it."""
        return self.budgets.get(category, self.budgets.get(DEFAULT))

    def complaints(self) -> list[tuple[tuple[str | int, ...], str]]:
        """What is wrong between rewards, guards and budgets: place in the stage, message."""
        names = [reward.label for reward in self.rewards]
        found: list[tuple[tuple[str | int, ...], str]] = []
        seen: set[str] = set()
        for index, guard in enumerate(self.guards):
            if guard.label in names:
                message = (
                    f"{guard.label!r} is a reward of this stage, too. Every reward is guarded; leave it out here, or "
                    f"give the guard another 'name'"
                )
                found.append((("guards", index), message))
            elif guard.label in seen:
                found.append((("guards", index), f"two guards are called {guard.label!r}; give one another 'name'"))
            seen.add(guard.label)
        for category, budget in self.budgets.items():
            found += [(("budgets", category, *place), message) for place, message in self._wrong(budget, names, seen)]
        return found

    @staticmethod
    def _wrong(budget: dict[str, NotNegative], names: list[str], guards: set[str]) -> list[tuple[tuple[str, ...], str]]:
        for name in budget:
            if name in guards:
                message = f"{name!r} is a guard, watched and not trained on. Make it one of 'rewards', or leave it out"
                return [((name,), message)]
            if name not in names:
                return [((name,), f"no reward of this stage is called {name!r}.{suggest(name, names)}")]
        total = sum(budget.values())
        if abs(total - 1) > 1e-6:
            return [((), f"the shares sum to {total:g}, not to 1")]
        return []
