"""Reward calibration: score groups of samples twice, and find the weights that realise stated budgets.

Weights that equal in number do not equal in effect: rewards agree and disagree, and some are noise. A budget says which
share of the advantage's variance a reward is to have in a category; the weights follow from what is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from safetensors.torch import load_file, save_file

from velatura.core.calibrate_settings import DEFAULT
from velatura.core.calibration import Floats, Measured, Statistics, correlations, statistics
from velatura.core.errors import RecipeError, suggest
from velatura.core.interruption import INTERRUPTION
from velatura.core.judge import Judge
from velatura.core.policy import CURRENT, Policy
from velatura.core.preferences import Fit, Pairs, budgets_of, fit, read_pairs, read_picture, summary
from velatura.core.rollout import Sampler, rollout
from velatura.core.seeds import derive
from velatura.core.stages.common import StageRun, Ticker, kept_prompts, manifest_of
from velatura.core.stages.reward_metrics import failed_in
from velatura.core.types import Prompt, RewardReport, Sample, Status
from velatura.core.weighing import Rules, Weighed, weigh
from velatura.core.weight_ledger import Origin, write_calibration


def run(stage: StageRun) -> dict[str, Any]:
    """Draw, score, solve, and write the ledger."""
    config = stage.config
    with ExitStack() as stack:
        judges = [stack.enter_context(_judge(stage, repeat)) for repeat in range(config.repeats)]
        prompts = chosen_prompts(stage)
        require_budgets(stage, prompts, judges[0])
        pairs = _pair_lines(stage, prompts)
        measured, failures = _measure_all(stage, judges, prompts)
        if not stage.ranks.first:
            return {}
        found = statistics(measured)
        fitted = _fit(stage, judges[0], prompts, pairs, measured, found) if pairs else None
    rules = Rules(
        rewards=len(config.rewards), prior=config.prior_groups, kappa=config.kappa, bootstrap=config.bootstrap,
        seed=stage.seed,
    )  # fmt: skip
    weighed = [_weigh(stage, category, measured, found, rules, fitted) for category in measured.shares]
    write_calibration(stage.folder, measured.names, rules.rewards, found, weighed, _origin(stage))
    for own in weighed:
        logger.info("{}: {}", stage.name, described(measured.names, own))
    return {
        "prompts": len(prompts), "samples": len(measured.group), "failures": failures,
        "conflicting": [own.category for own in weighed if own.is_conflicting],
        "weights": {own.category: _plain(measured.names[: rules.rewards], own.weights) for own in weighed},
        "human_pairs": None if fitted is None else dict(summary(fitted)),
    }  # fmt: skip


def _judge(stage: StageRun, repeat: int) -> Judge:
    """Rewards at weight 1, guards at 0. A reward that draws at random does so from another seed at each repeat."""
    asked = stage if repeat == 0 else replace(stage, seed=derive(stage.seed, "retest", repeat))
    config = stage.config
    places = [
        (f"{slot}.{i}", ref, weight)
        for slot, refs, weight in (("rewards", config.rewards, 1.0), ("guards", config.guards, 0.0))
        for i, ref in enumerate(refs)
    ]
    return Judge(
        [asked.reward(ref, at, weight, again=repeat > 0) for at, ref, weight in places], max_failed=config.max_failed,
        ranks=stage.ranks,
    )  # fmt: skip


def chosen_prompts(stage: StageRun) -> list[Prompt]:
    """The first `groups` prompts of each category, in their order; a prompt of several counts in its largest."""
    config = stage.config
    train = kept_prompts(stage, config.prompts) if config.prompts else stage.task_of(stage.name).prompts("train")
    taken: Counter[str] = Counter()
    chosen = []
    for prompt in (train[i] for i in range(len(train))):
        category = max(prompt.membership.items(), key=lambda item: item[1])[0]
        if taken[category] < config.groups:
            taken[category] += 1
            chosen.append(prompt)
    return chosen


def require_budgets(stage: StageRun, prompts: Sequence[Prompt], judge: Judge) -> None:
    """Every category has a budget, every budget prompts, and every reward with a share something to say there.

    Raises:
        RecipeError: before anything is drawn.
    """
    config, by_category = stage.config, _by_category(prompts)
    for category, own in by_category.items():
        budget = config.budget_of(category)
        if budget is None:
            raise RecipeError(
                f"{stage.at('budgets')}: there are prompts of category '{category}' and no budget for it. Give it one, "
                f"or one for 'default'."
            )
        for reward in judge.rewards:
            if budget.get(reward.label, 0) > 0 and not any(reward.applies(prompt) for prompt in own):
                raise RecipeError(
                    f"{stage.at('budgets')}: '{reward.label}' has {budget[reward.label]:g} of category '{category}', "
                    f"but it applies to none of its prompts. Give the share to other rewards."
                )
    for category in config.budgets:
        if category != DEFAULT and category not in by_category:
            message = (
                f"{stage.at('budgets')}: there is no prompt of category '{category}'.{suggest(category, by_category)}"
            )
            if not config.prompts:
                raise RecipeError(message)
            logger.warning("{} '{}' may have kept none.", message, config.prompts)


def _by_category(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        for category in prompt.membership:
            found.setdefault(category, []).append(prompt)
    return dict(sorted(found.items()))


def _measure_all(stage: StageRun, judges: Sequence[Judge], prompts: Sequence[Prompt]) -> tuple[Measured, int]:
    """All blocks, groups numbered through, and how many scores failed, interruptions included."""
    config, adapter = stage.config, stage.adapter()
    policy = stage.load_policy(adapter, config.model)
    sampler = stage.sampler(adapter)
    blocks = max(1, config.sampling.batch // config.group_size)
    firsts = range(0, len(prompts), blocks)
    parts, failures = [], 0
    with stage.progress(len(prompts), unit="prompts") as bar:
        made = {}
        for first in stage.ranks.own(firsts):
            if INTERRUPTION.asked:
                break
            made[first] = _measure(stage, policy, sampler, judges, prompts[first : first + blocks], first, bar)
        stage.leave_if_asked()  # and what the others measured is on disk
        for first in firsts:
            own = prompts[first : first + blocks]
            part = made.get(first) or _measure(stage, policy, sampler, judges, own, first, bar)
            parts.append((part["scores"].double().numpy(), part["status"].numpy(), part["group"].numpy() + first))
            failures += failed_in(part["status"])
    categories = _by_category(prompts)
    measured = Measured(
        names=tuple(reward.label for reward in judges[0].rewards),
        scores=np.concatenate([scores for scores, _, _ in parts], axis=1),
        valid=np.concatenate([status for _, status, _ in parts], axis=1) == int(Status.OK),
        group=np.concatenate([group for _, _, group in parts]),
        shares={c: np.array([prompt.membership.get(c, 0.0) for prompt in prompts]) for c in categories},
    )
    return measured, failures


def _measure(
    stage: StageRun, policy: Policy, sampler: Sampler, judges: Sequence[Judge], prompts: Sequence[Prompt], first: int,
    bar: Ticker,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Scores [S B M], statuses and groups of one block, from disk when an earlier run already made it."""
    path = stage.folder / "blocks" / f"{first:06d}.safetensors"
    if path.exists():
        bar.tick("measured before", len(prompts))
        return load_file(path)
    every = range(stage.config.group_size)
    seeds = [[derive(stage.seed, "calibrate", prompt.id, j) for j in every] for prompt in prompts]
    with policy.wearing(CURRENT) as net:
        for chunk in rollout(net, sampler, prompts, seeds):
            for judge in judges:
                judge.submit(chunk.samples)
    reports = [judge.report(prompts) for judge in judges]
    made = {
        "scores": torch.stack([report.scores for report in reports]),
        "status": torch.stack([report.status for report in reports]),
        "group": reports[0].group,
    }
    _save(path, made)
    bar.tick("", len(prompts))
    return made


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _pair_lines(stage: StageRun, prompts: Sequence[Prompt]) -> list[tuple[Sample, Sample, float]]:
    """Pictures that people compared, and 1 where the first was preferred, 0 where the second, 1/2 for a tie."""
    if stage.config.human_pairs is None:
        return []
    path = stage.context().resolve(stage.config.human_pairs)
    known = {prompt.id: prompt for prompt in prompts}
    wins = {"a": 1.0, "b": 0.0, "tie": 0.5}
    found = []
    for number, line in enumerate(read_pairs(path, list(known))):
        a, b = (
            Sample(prompt=known[line.prompt], image=read_picture(path.parent / name), seed=0, group=number)
            for name in (line.a, line.b)
        )
        found.append((a, b, wins[line.preferred]))
    return found


def _fit(
    stage: StageRun, judge: Judge, prompts: Sequence[Prompt], pairs: Sequence[tuple[Sample, Sample, float]],
    measured: Measured, found: Statistics,
) -> Fit:  # fmt: skip
    """Utilities that explain what people prefer; warns where budgets stay as they are written."""
    batch = max(1, stage.config.sampling.batch // 2)
    for first in range(0, len(pairs), batch):
        judge.submit([sample for a, b, _ in pairs[first : first + batch] for sample in (a, b)])
    report = judge.report([a.prompt for a, _, _ in pairs])
    made = fit(_pairs(report, pairs, measured, found, len(stage.config.rewards)), bootstrap=2000, seed=stage.seed)
    if made.refused:
        logger.warning("{}: budgets stay as written, not fitted to people: {}", stage.name, made.refused)
    return made


def _pairs(
    report: RewardReport, pairs: Sequence[tuple[Sample, Sample, float]], measured: Measured, found: Statistics,
    rewards: int,
) -> Pairs:  # fmt: skip
    """Differences in units of each reward's spread; a pair with a score that failed is left out."""
    scores, status = report.scores[:, :rewards].double().numpy(), report.status[:, :rewards].numpy()
    shares = np.array([[a.prompt.membership.get(c, 0.0) for c in measured.shares] for a, _, _ in pairs])
    spread = shares @ np.nan_to_num(np.stack([found.spread[c][:rewards] for c in measured.shares]))
    valid = status == int(Status.OK)
    both = valid[0::2] & valid[1::2]
    whole = (both | (status[0::2] == int(Status.NOT_APPLICABLE))).all(1)
    gap = np.where(both & (spread > 0), scores[0::2] - scores[1::2], 0.0) / np.where(spread > 0, spread, 1.0)
    every = Pairs(
        difference=gap, preferred=np.array([won for _, _, won in pairs]), shares=shares,
        prompts=tuple(a.prompt.id for a, _, _ in pairs),
    )  # fmt: skip
    return every.only(whole)


def _weigh(
    stage: StageRun, category: str, measured: Measured, found: Statistics, rules: Rules, fitted: Fit | None
) -> Weighed:
    """Weights of a category, from its budget as written or as people's choices say."""
    budget: Mapping[str, float] = stage.config.budget_of(category)
    origin = "budget as written"
    if fitted is not None and fitted.refused:
        origin = f"budget as written, because the fit to people was refused: {fitted.refused}"
    elif fitted is not None:
        names = measured.names[: rules.rewards]
        own = fitted.utilities[list(measured.shares).index(category)]
        utility: Floats = np.where(np.isnan(found.spread[category][: rules.rewards]), 0.0, own)
        if utility.any():
            sigma = correlations(found, measured.shares[category], prior=rules.prior)[: len(names), : len(names)]
            budget = _plain(names, budgets_of(utility, sigma))
            origin = f"budget fitted to {fitted.pairs} pairs of {fitted.prompts} prompts"
    return weigh(measured, found, category, budget, rules, origin)


def _plain(names: Sequence[str], values: Floats) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=False)}


def _origin(stage: StageRun) -> Origin:
    model = stage.config.model
    steps = 0 if model == "base" else manifest_of(stage.run_folder, model)["result"].get("steps", 0)
    return Origin(model=model, step=int(steps))


def described(names: Sequence[str], own: Weighed) -> str:
    """A category in a line, for the log."""
    parts = [
        f"{name} {own.weights[k]:.3f} (share {own.share[k]:.0%} of {own.budget[k]:.0%})"
        for k, name in enumerate(names)
        if own.budget[k] > 0
    ]
    return f"{own.category}: {', '.join(parts)}; {own.reason}"
