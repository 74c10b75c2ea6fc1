"""From scores of several rewards to one advantage: what every advantage estimator here shares.

Order: tier cap (on raw scores), standardisation (what the estimators differ in), weighted sum, veto, clip.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from velatura.api import Advantages, Options, RewardReport, Status
from velatura.core.errors import suggest


class TierCap(Options):
    """How a low score of an earlier tier limits the later ones."""

    none_below: float = Field(2.0, description="At this score of an earlier tier and below, the later get `lowest`.")
    all_above: float = Field(3.0, description="At this score and above, the later ones are not limited.")
    lowest: float = Field(1.0, description="Lowest score of the scale that all tiers share.")
    highest: float = Field(5.0, description="Highest score of that scale.")

    @model_validator(mode="after")
    def _is_a_ramp(self) -> Self:
        if not (self.lowest <= self.none_below < self.all_above <= self.highest and self.lowest < self.highest):
            raise ValueError(
                f"a cap needs lowest <= none_below < all_above <= highest, not {self.lowest:g}, {self.none_below:g}, "
                f"{self.all_above:g}, {self.highest:g}"
            )
        return self


class CompositionOptions(Options):
    """What every advantage estimator here can do before and after it compares scores."""

    tiers: list[str] = Field(
        default_factory=list,
        description="Rewards by name, most basic first, all on one scale: a low score of one caps those after it. "
        "Empty caps nothing.",
    )
    tier_cap: TierCap = Field(TierCap(), description="How tiers are capped.")
    veto: dict[str, float] = Field(
        default_factory=dict,
        description="Reward -> least score. A sample below it comes out worse than all others of its group. The "
        "reward may have weight 0.",
    )
    clip: float | None = Field(5.0, gt=0, description="Advantages are clipped to ± this; null clips nothing.")
    min_valid: float = Field(
        0.75, gt=0, le=1, description="A reward counts in a group where this share of its scores, and two, are valid."
    )
    min_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A sample is dropped where the rewards that count hold less than this share of its weight.",
    )

    @model_validator(mode="after")
    def _ranks_something(self) -> Self:
        if len(self.tiers) == 1:
            raise ValueError(f"tiers: one tier, {self.tiers[0]!r}, caps nothing. Name two or more, or none")
        if len(set(self.tiers)) < len(self.tiers):
            twice = next(name for name in self.tiers if self.tiers.count(name) > 1)
            raise ValueError(f"tiers: {twice!r} is named twice")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparable:
    """The scores of a report that can be compared with others of their group."""

    scores: Tensor
    """[B R] fp64; 0 where a score does not count."""
    counts: Tensor
    """[B R] bool: valid, weighted, and in a group with enough valid scores of the reward."""
    count: Tensor
    """[P R] fp64: how many valid scores a group has."""
    enough: Tensor
    """[P R] bool: groups in which a reward counts."""
    group: Tensor
    """[B]."""

    @property
    def centred(self) -> Tensor:
        """[B R] scores less the mean of their group; fp64 means of equal fp32 scores are exact, so 0 is 0."""
        mean = per_group(self.scores, self.group, len(self.count)) / self.count.clamp_min(1)
        return (self.scores - mean[self.group]).where(self.counts, 0)

    def squares(self) -> Tensor:
        """[P R] sum of squared deviations from the group's mean."""
        return per_group(self.centred.square(), self.group, len(self.count))


Standardise = Callable[[Comparable], Tensor]
"""[B R] fp64 standardised scores; what does not count may be anything."""


def composed(
    report: RewardReport,
    options: CompositionOptions,
    standardise: Standardise,
    *,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Advantages:
    """A_i = clip(sum_k w_k z_ik / sum_k w_k), over the rewards that apply to sample i and whose score counts.

    `scale`: [B R] normalised weights to [B 1] what the sum is divided by; 1 when left out. A sample is valid where the
    rewards that count hold `min_weight` of its weight, and where no veto is unknown because its score is missing.
    """
    capped = tier_capped(report, options.tiers, options.tier_cap)
    comparable = comparable_scores(capped, options.min_valid)
    z = standardise(comparable).where(comparable.counts, 0)
    weight = report.weight.double().clamp_min(0)
    applies = (weight > 0) & (report.status != int(Status.NOT_APPLICABLE))
    remaining, total = (weight * comparable.counts).sum(1), (weight * applies).sum(1)
    vetoed, unknown = vetoes(report, options.veto)
    valid = (remaining > 0) & (remaining >= options.min_weight * total) & ~unknown
    share = weight * comparable.counts / remaining.where(valid, 1)[:, None]
    sums = (share * z).sum(1)
    if scale is not None:
        sums = sums / scale(share).flatten()
    sums = with_vetoes(sums.where(valid, 0), valid, vetoed, report)
    clip = options.clip if options.clip is not None else torch.inf
    clipped = sums.where(valid, 0).clamp(-clip, clip).float()
    metrics = _metrics(report, clipped, valid, applies.any(1), clip)
    if options.veto:
        metrics["vetoed_samples"] = share_of((vetoed & valid).sum(), int(valid.sum()))
    return Advantages(values=clipped, valid=valid, metrics=metrics)


def comparable_scores(report: RewardReport, min_valid: float) -> Comparable:
    """What failed enters nowhere, whatever number it carries; neither does a score that is alone in its group."""
    groups = len(report.prompts)
    weighted = (report.weight > 0) & (report.status != int(Status.NOT_APPLICABLE))
    usable = weighted & report.valid
    count, asked = (per_group(flags.double(), report.group, groups) for flags in (usable, weighted))
    enough = (count >= 2) & (count >= min_valid * asked)
    counts = usable & enough[report.group]
    scores = report.scores.double().where(counts, 0)
    return Comparable(scores=scores, counts=counts, count=count, enough=enough, group=report.group)


def tier_capped(report: RewardReport, tiers: Sequence[str], cap: TierCap) -> RewardReport:
    """x'_k = min(x_k, cap(min_{l < k} x_l)), cap(u) = L + (H - L) clip((u - a) / (b - a), 0, 1), a reading of the
    layered rewards of Qwen-Image-2.0-RL (arXiv:2606.27608).

    a, b: `none_below`, `all_above`; L, H: the scale. A tier that does not apply caps nothing. Where a tier failed, what
    it would have capped is not known, so the later ones count as failed, too.
    """
    if not tiers:
        return report
    scores, status = report.scores.clone(), report.status.clone()
    lowest = torch.full((len(scores),), torch.inf)
    failed = torch.zeros(len(scores), dtype=torch.bool)
    for column in (report.names.index(name) for name in tiers):
        own, applies = report.valid[:, column], report.status[:, column] != int(Status.NOT_APPLICABLE)
        status[failed & applies, column] = int(Status.FAILED)
        ramp = ((lowest - cap.none_below) / (cap.all_above - cap.none_below)).clamp(0, 1)
        limit = cap.lowest + (cap.highest - cap.lowest) * ramp
        scores[:, column] = torch.where(lowest.isinf(), scores[:, column], torch.minimum(scores[:, column], limit))
        lowest = torch.where(own, torch.minimum(lowest, report.scores[:, column]), lowest)
        failed = failed | (applies & ~own)
    return replace(report, scores=scores, status=status)


def vetoes(report: RewardReport, least: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """[B] samples below a least score, and [B] those of which nobody can say because the score is missing."""
    vetoed = torch.zeros(len(report.group), dtype=torch.bool)
    unknown = vetoed.clone()
    for name, bound in least.items():
        column = report.names.index(name)
        valid, status = report.valid[:, column], report.status[:, column]
        vetoed |= valid & (report.scores[:, column] < bound)
        unknown |= ~valid & (status != int(Status.NOT_APPLICABLE))
    return vetoed, unknown


def with_vetoes(sums: Tensor, valid: Tensor, vetoed: Tensor, report: RewardReport) -> Tensor:
    """Vetoed samples get the minimum of their group less one pooled standard deviation; then such a group is centred.

    The standard deviation is the root of the mean within-group variance of the sums of this batch; 1 where all of
    them are constant.
    """
    if not bool((vetoed & valid).any()):
        return sums
    rows = [torch.nonzero((report.group == p) & valid).flatten() for p in range(len(report.prompts))]
    variances = [sums[own].var(correction=0) for own in rows if len(own) > 1]
    pooled = torch.stack(variances).mean().sqrt() if variances else sums.new_zeros(())
    step, found = pooled if pooled > 0 else sums.new_ones(()), sums.clone()
    for own in rows:
        if len(own) and bool(vetoed[own].any()):
            replaced = torch.where(vetoed[own], sums[own].min() - step, sums[own])
            found[own] = replaced - replaced.mean()
    return found


def unknown_reward(options: CompositionOptions, rewards: Collection[str]) -> str:
    """What to say of a tier or veto that is no reward of the stage; empty when all are."""
    for place, names in (("tiers", options.tiers), ("veto", list(options.veto))):
        for name in names:
            if name not in rewards:
                return f"{place}: no reward of this stage is called {name!r}.{suggest(name, rewards)}"
    return ""


def soft_minimum(scores: Tensor, weight: Tensor, beta: float) -> Tensor:
    """-(1 / beta) log sum_k w_k exp(-beta x_k), [B] of [B R] scores and [B R] weights that sum to 1.

    Between the weighted mean (beta to 0) and the minimum over weights above 0 (beta to infinity).
    """
    return -torch.logsumexp(weight.log() - beta * scores, dim=1) / beta


def geometric(scores: Tensor, weight: Tensor, floor: float) -> Tensor:
    """exp(sum_k w_k log max(x_k, floor)), [B] of [B R] scores in [0, 1] and [B R] weights that sum to 1."""
    return (weight * scores.clamp_min(floor).log()).sum(1).exp()


def per_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums [P R] of `values` [B R] over the samples of each group."""
    return values.new_zeros(groups, values.shape[1]).index_add(0, group, values)


def share_of(part: Tensor, whole: int) -> float:
    """part / whole, 0 of nothing."""
    return float(part) / whole if whole else 0.0


def _metrics(report: RewardReport, values: Tensor, valid: Tensor, asked: Tensor, clip: float) -> dict[str, float]:
    """Shares are of groups in which some reward applies, and of samples that are valid."""
    flags = torch.stack([asked, valid, valid & (values != 0)], 1).double()
    rated, alive, moving = (per_group(flags, report.group, len(report.prompts)) > 0).unbind(1)
    live = values[valid].abs()
    return {
        "mean_abs": share_of(live.sum(), len(live)),
        "clipped": share_of((live >= clip).sum(), len(live)),
        "zero_signal_groups": share_of((alive & ~moving).sum(), int(rated.sum())),
        "dropped_groups": share_of((rated & ~alive).sum(), int(rated.sum())),
        "dropped_samples": share_of((asked & ~valid).sum(), int(asked.sum())),
    }
