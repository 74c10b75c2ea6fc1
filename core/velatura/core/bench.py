"""How fast the rewards of a recipe are, and what they cost a training step: what `velatura rewards bench` measures."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from velatura.core.check import set_up
from velatura.core.errors import RecipeError
from velatura.core.judge import Judge, WeightedReward
from velatura.core.pipeline import Plan
from velatura.core.recipe import RewardRef
from velatura.core.seeds import generator
from velatura.core.served import recipe_context, set_up_reward
from velatura.core.types import Prompt, RewardReport, Role, Sample, Status, Usage

LOOK = 512
"""Prompts that are looked at for those that a reward applies to."""
FALLBACK = (512, 512)
"""Height and width of random pictures where neither prompt nor adapter says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One reward of one stage."""

    stage: str
    reward: str
    calls: int
    """Calls that were timed."""
    batch: int
    """Pictures in a call."""
    calls_per_second: float
    pictures_per_second: float
    p50: float
    """Median seconds of a call."""
    p95: float
    failed: float
    """Share of the pictures it was shown that got no score, statuses failed and refused."""
    reason: str
    """Of the last of them."""
    not_applicable: float
    """Share of the pictures it was shown that it had nothing to say of."""
    pictures_per_step: int
    """That it scores in a training step: those whose prompts it applies to."""
    seconds_per_step: float
    """Of scoring, for a training step."""
    prompt_tokens: float | None = None
    """Read for a picture, repeated requests among them; None for a reward that counts none."""
    completion_tokens: float | None = None
    """Written for a picture."""
    cost_per_step: float | None = None
    """Of the tokens of a training step, in the unit of the prices; None without a price or without tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Of a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt: float, completion: float) -> float:
        """What so many tokens cost."""
        return (self.prompt * prompt + self.completion * completion) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A stage's rewards, about to be measured."""

    plan: Plan
    stage: str
    device: str | None
    calls: int
    batch: int | None = None
    """Pictures in a call; None takes as many as a run hands over at a time."""
    prices: Prices | None = None
    _prompts: list[Prompt] = field(default_factory=list)

    @property
    def pictures_per_step(self) -> int:
        """prompts_per_step x group_size."""
        config: Any = self.plan.recipe.stage(self.stage)
        return int(config.prompts_per_step) * int(config.group_size)

    def measure(self, index: int, ref: RewardRef, tick: Callable[[], None]) -> Measured | None:
        """One reward on pictures of the task; None where it applies to none of the prompts. The first call, in which
        libraries warm up, is not timed."""
        place = self.plan.recipe.at(("stages", self.stage, "rewards", index))
        model = set_up_reward(
            self.plan.registry, ref.opened(self.plan.folder), ref.label, recipe_context(self.plan, self.device)
        ).model
        reward = WeightedReward(
            label=ref.label, at=place, model=model, weight=ref.weight, weight_by_category=ref.weight_by_category
        )
        prompts = self.prompts()
        asked = [p for p in prompts if reward.weight_for(p) > 0 or (reward.weight == 0 and reward.applies(p))]
        if not asked:
            return None
        size = self.batch or self._chunk()
        seconds, reports, before = [], [], None
        with Judge([reward], max_failed=1.0, retries=0) as judge:
            for call in range(-1, self.calls):
                samples = self._samples(asked, call + 1, size, ref.label)
                before = model.usage() if call <= 0 else before
                begin = time.perf_counter()
                judge.submit(samples)
                report = judge.report([sample.prompt for sample in samples])
                if call >= 0:
                    seconds.append(time.perf_counter() - begin)
                    reports.append(report)
                tick()
        shown = round(self.pictures_per_step * len(asked) / len(prompts))
        row = _measured(self.stage, ref.label, size, seconds, reports, shown)
        return _with_tokens(row, before, model.usage(), self.prices)

    def prompts(self) -> list[Prompt]:
        """The first training prompts of the stage's task.

        Raises:
            RecipeError: it has none.
        """
        ref = self.plan.recipe.task_of(self.stage)
        if not self._prompts and ref is not None:
            task = set_up(self.plan, "task", ref)
            train = task.prompts("train")
            self._prompts.extend(train[i] for i in range(min(len(train), LOOK)))
        if not self._prompts:
            raise RecipeError(f"stage '{self.stage}' has no prompts to measure on")
        return self._prompts

    def _chunk(self) -> int:
        """Pictures that a rollout hands to the judge at a time: whole groups in one forward of the sampler."""
        config: Any = self.plan.recipe.stage(self.stage)
        guidance = set_up(self.plan, "guidance", config.guidance)
        guided = bool((guidance.scale(Role.ROLLOUT, torch.linspace(1, 0, 9)[:-1]) != 1).any())
        groups = max(1, config.sampling.batch // (config.group_size * (2 if guided else 1)))
        return int(min(groups, config.prompts_per_step)) * int(config.group_size)

    def _samples(self, prompts: Sequence[Prompt], call: int, size: int, label: str) -> list[Sample]:
        """`size` pictures, in groups as in training, other ones in each call."""
        config: Any = self.plan.recipe.stage(self.stage)
        group = min(size, int(config.group_size))
        first = call * math.ceil(size / group)
        default = self._size()
        return [
            Sample(
                prompt=(prompt := prompts[(first + i // group) % len(prompts)]), seed=call * size + i, group=i // group,
                image=_picture(prompt, default, generator(self.plan.recipe.seed, "bench", label, call, i)),
            )
            for i in range(size)
        ]  # fmt: skip

    def _size(self) -> tuple[int, int]:
        """Height and width of the adapter's pictures."""
        config: Any = self.plan.recipe.stage(self.stage)
        said = str(set_up(self.plan, "adapter", config.adapter).describe().get("image size", ""))
        found = re.fullmatch(r"(\d+) x (\d+)", said)
        return (int(found[2]), int(found[1])) if found else FALLBACK


def _picture(prompt: Prompt, default: tuple[int, int], draw: torch.Generator) -> Tensor:
    """What a policy might have drawn: the picture to learn from, the first source, or else noise of the right size.

    A little noise is on each, so that no two are the same.
    """
    known = prompt.target if prompt.target is not None else prompt.sources[0] if prompt.sources else None
    if known is None:
        return torch.rand(3, *(prompt.size or default), generator=draw)
    image = known.detach().float().cpu()
    return (image + 0.02 * torch.randn(image.shape, generator=draw)).clamp(0, 1)


def _measured(
    stage: str, label: str, batch: int, seconds: Sequence[float], reports: Sequence[RewardReport], per_step: int
) -> Measured:
    status = torch.cat([report.status[:, 0] for report in reports])
    lost = (status == int(Status.FAILED)) | (status == int(Status.REFUSED))
    reasons = [reason for report in reports for reason in report.reasons[0]]
    total, pictures = sum(seconds), len(seconds) * batch
    return Measured(
        stage=stage, reward=label, calls=len(seconds), batch=batch,
        calls_per_second=len(seconds) / total, pictures_per_second=pictures / total,
        p50=float(np.quantile(seconds, 0.5)), p95=float(np.quantile(seconds, 0.95)),
        failed=float(lost.float().mean()),
        reason=next((reasons[i] for i in reversed(range(len(reasons))) if lost[i]), ""),
        not_applicable=float((status == int(Status.NOT_APPLICABLE)).float().mean()),
        pictures_per_step=per_step, seconds_per_step=per_step * total / pictures,
    )  # fmt: skip


def _with_tokens(row: Measured, before: Usage | None, after: Usage | None, prices: Prices | None) -> Measured:
    """The same, with the tokens of its calls, where the reward counts them."""
    if after is None:
        return row
    used, pictures = after - (before or Usage()), row.calls * row.batch
    prompt, completion = used.prompt / pictures, used.completion / pictures
    cost = None if prices is None else row.pictures_per_step * prices.of(prompt, completion)
    return replace(row, prompt_tokens=prompt, completion_tokens=completion, cost_per_step=cost)


def stages_of(plan: Plan, stage: str | None) -> list[str]:
    """The stages whose rewards are measured: those of kind rl, or the one asked for.

    Raises:
        RecipeError: there is none.
    """
    known = [name for name in plan.recipe.order() if plan.recipe.stage(name).stage == "rl"]
    if stage is not None and plan.recipe.stage(stage).stage != "rl":
        raise RecipeError(
            f"stage '{stage}' is of kind {plan.recipe.stage(stage).stage}; only rl has steps with rewards"
        )
    if not known:
        raise RecipeError("the recipe has no stage of kind rl, so there is no training step to measure rewards for")
    return known if stage is None else [stage]


def table(rows: Sequence[Measured], silent: Sequence[tuple[str, str]]) -> Table:
    """What was measured, and the rewards that apply to none of the prompts."""
    made = Table(
        title="Rewards", title_justify="left",
        caption="call: one batch; tokens: read + written for a picture; s/step: seconds of scoring for a training step",
    )  # fmt: skip
    for column in ("stage", "reward", "calls", "batch", "calls/s", "pictures/s", "p50 s", "p95 s", "failed", "n/a",
                   "tokens", "pictures/step", "s/step", "cost/step"):  # fmt: skip
        made.add_column(column, justify="left" if column in ("stage", "reward") else "right")
    for row in rows:
        made.add_row(
            row.stage, row.reward, str(row.calls), str(row.batch), _number(row.calls_per_second),
            _number(row.pictures_per_second), _number(row.p50), _number(row.p95), f"{row.failed:.1%}",
            f"{row.not_applicable:.1%}", _tokens(row), str(row.pictures_per_step), _number(row.seconds_per_step),
            "" if row.cost_per_step is None else _number(row.cost_per_step),
        )  # fmt: skip
    for stage, label in silent:
        made.add_row(stage, label, "0", *[""] * 8, "0", "0", "")
    return made


def together(rows: Sequence[Measured]) -> dict[str, tuple[float, float]]:
    """Stage -> seconds of scoring for a training step, if its rewards work beside each other, and if one after the
    other. A run is between the two: each reward has a thread, and threads share cores and GPU."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        beside, after = found.get(row.stage, (0.0, 0.0))
        found[row.stage] = (max(beside, row.seconds_per_step), after + row.seconds_per_step)
    return found


def as_data(rows: Sequence[Measured], silent: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
    """The same for programs."""
    nothing = [{"stage": stage, "reward": label, "calls": 0} for stage, label in silent]
    stages = {
        stage: {"seconds_per_step_beside": beside, "seconds_per_step_after": after}
        for stage, (beside, after) in together(rows).items()
    }
    return {"rewards": [asdict(row) for row in rows] + nothing, "stages": stages}


def _tokens(row: Measured) -> str:
    if row.prompt_tokens is None or row.completion_tokens is None:
        return ""
    return f"{row.prompt_tokens:,.0f} + {row.completion_tokens:,.0f}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
