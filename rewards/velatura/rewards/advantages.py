"""From scores to advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import AdvantageEstimator, Advantages, Options, RewardReport, Status


class GroupZOptions(Options):
    """Options of `group-z`."""

    std_floor: float = Field(
        0.1,
        ge=0,
        description="Least std of a group, as a fraction of the reward's pooled within-group std in this batch: "
        "keeps the noise of nearly constant groups from being blown up. 0 is the paper.",
    )
    eps: float = Field(1e-4, gt=0, description="Least std of a group, in the reward's own units.")
    clip: float = Field(5.0, gt=0, description="Advantages are clipped to ± this.")
    min_valid: float = Field(
        0.75, gt=0, le=1, description="A reward counts in a group where this share of its scores, and two, are valid."
    )
    min_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A sample is dropped where the rewards that count hold less than this share of its weight.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standardised:
    """Scores standardised per reward and group."""

    z: Tensor
    """[B R] fp64; 0 where the score does not count."""
    counts: Tensor
    """[B R] bool: valid, weighted, and in a group with enough valid scores of the reward."""


class GroupZ(AdvantageEstimator[GroupZOptions]):
    """Per reward and group a z-score; then the weighted sum (Qwen-Image-2.0-RL, arXiv:2606.27608).

    z_ik = (R_ik - mu_gk) / max(sigma_gk, std_floor sigma_k, eps),   A_i = clip(sum_k w_k z_ik / sum_k w_k, +-clip).
    mu, sigma: mean and population std over the valid scores of reward k in group g; sigma_k: root of the mean of
    sigma_gk^2 over groups. The sums run over the rewards that apply to sample i and whose score is valid, so weights
    sum to 1 for every sample. Groups are prompt ids, never texts.

    A_i is 0 in a constant group (valid, no signal), and 0 and not valid where scores are missing beyond `min_valid`
    and `min_weight`. The floors aside, an affine change of a reward changes nothing. fp64 inside.
    """

    name = "group-z"

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages of [B R] scores."""
        standard = self._standardise(report)
        weight = report.weight.double().clamp_min(0)
        applies = (weight > 0) & (report.status != int(Status.NOT_APPLICABLE))
        remaining, total = (weight * standard.counts).sum(1), (weight * applies).sum(1)
        valid = (remaining > 0) & (remaining >= self.options.min_weight * total)
        sums = (weight * standard.z).sum(1) / remaining.where(valid, 1)
        clipped = sums.where(valid, 0).clamp(-self.options.clip, self.options.clip).float()
        return Advantages(values=clipped, valid=valid, metrics=self._metrics(report, clipped, valid, applies.any(1)))

    def _standardise(self, report: RewardReport) -> _Standardised:
        """Z-scores over the scores that count; what failed enters nowhere, whatever number it carries."""
        groups = len(report.prompts)
        weighted = (report.weight > 0) & (report.status != int(Status.NOT_APPLICABLE))
        usable = weighted & report.valid
        count, asked = (_per_group(flags.double(), report.group, groups) for flags in (usable, weighted))
        enough = (count >= 2) & (count >= self.options.min_valid * asked)
        counts = usable & enough[report.group]
        scores = report.scores.double().where(counts, 0)  # fp64 means of equal fp32 scores are exact: z is exactly 0
        mean = _per_group(scores, report.group, groups) / count.clamp_min(1)
        centred = (scores - mean[report.group]).where(counts, 0)
        variance = _per_group(centred.square(), report.group, groups) / count.clamp_min(1)
        pooled = (variance * enough).sum(0) / enough.sum(0).clamp_min(1)
        floor = (self.options.std_floor * pooled.sqrt()).clamp_min(self.options.eps)
        return _Standardised(z=centred / torch.maximum(variance.sqrt(), floor)[report.group], counts=counts)

    def _metrics(self, report: RewardReport, values: Tensor, valid: Tensor, asked: Tensor) -> dict[str, float]:
        """Shares are of groups in which some reward applies, and of samples that are valid."""
        groups = len(report.prompts)
        flags = torch.stack([asked, valid, valid & (values != 0)], 1).double()
        rated, alive, moving = (_per_group(flags, report.group, groups) > 0).unbind(1)
        live = values[valid].abs()
        return {
            "mean_abs": _share(live.sum(), len(live)),
            "clipped": _share((live >= self.options.clip).sum(), len(live)),
            "zero_signal_groups": _share((alive & ~moving).sum(), int(rated.sum())),
            "dropped_groups": _share((rated & ~alive).sum(), int(rated.sum())),
            "dropped_samples": _share((asked & ~valid).sum(), int(asked.sum())),
        }


def _per_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums [P R] of `values` [B R] over the samples of each group."""
    return values.new_zeros(groups, values.shape[1]).index_add(0, group, values)


def _share(part: Tensor, whole: int) -> float:
    """part / whole, 0 of nothing."""
    return float(part) / whole if whole else 0.0
