"""From scores to advantages: the estimators that look at one batch alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import AdvantageEstimator, Advantages, RewardReport
from velatura.rewards.composition import Comparable, CompositionOptions, composed, unknown_reward


class GroupZOptions(CompositionOptions):
    """Options of `group-z`."""

    std_floor: float = Field(
        0.1,
        ge=0,
        description="Least std of a group, as a fraction of the reward's pooled within-group std in this batch: "
        "keeps the noise of nearly constant groups from being blown up. 0 is the paper.",
    )
    eps: float = Field(1e-4, gt=0, description="Least std of a group, in the reward's own units.")


class GroupZ(AdvantageEstimator[GroupZOptions]):
    """Per reward and group a z-score; then the weighted sum (Qwen-Image-2.0-RL, arXiv:2606.27608).

    z_ik = (R_ik - mu_gk) / max(sigma_gk, std_floor sigma_k, eps),   A_i = clip(sum_k w_k z_ik / sum_k w_k, +-clip).
    mu, sigma: mean and population std over the valid scores of reward k in group g; sigma_k: root of the mean of
    sigma_gk^2 over the groups of the batch. Sums run over the rewards that apply to sample i and whose score is valid,
    so weights sum to 1 for every sample. Groups are prompt ids, never texts.

    A_i is 0 in a constant group (valid, no signal), and 0 and not valid where scores are missing beyond `min_valid`
    and `min_weight`. The floors aside, an affine change of a reward changes nothing. fp64 inside.
    """

    name = "group-z"

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages of [B R] scores."""
        return composed(report, self.options, self._standardise)

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """Tiers and vetoes are rewards."""
        return unknown_reward(self.options, rewards)

    def _standardise(self, scores: Comparable) -> Tensor:
        variance = scores.squares() / scores.count.clamp_min(1)
        pooled = (variance * scores.enough).sum(0) / scores.enough.sum(0).clamp_min(1)
        floor = (self.options.std_floor * pooled.sqrt()).clamp_min(self.options.eps)
        return scores.centred / torch.maximum(variance.sqrt(), floor)[scores.group]


class RawSumOptions(CompositionOptions):
    """Options of `raw-sum`."""

    clip: float | None = Field(
        None, gt=0, description="Advantages are clipped to ± this, in the units of the rewards; null clips nothing."
    )


class RawSum(AdvantageEstimator[RawSumOptions]):
    """The weighted mean of the rewards as they are, less its mean over the group: a baseline, and for looking.

    A_i = sum_k w_k (R_ik - mu_gk) / sum_k w_k. The reward with the largest scale decides. It is ours, from no paper.
    """

    name = "raw-sum"

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages, in the units of the rewards."""
        return composed(report, self.options, lambda scores: scores.centred)

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """Tiers and vetoes are rewards."""
        return unknown_reward(self.options, rewards)


class RankNormal(AdvantageEstimator[CompositionOptions]):
    """Per reward the normal score of the rank in the group; their weighted sum. For ordinal judges and heavy tails.

    z_ik = Phi^-1((r_ik - 3/8) / (n + 1/4)), r the rank among the n valid scores of the group, ties sharing their mean
    rank (Blom 1958). Any increasing change of a reward changes nothing; how far apart two scores are is not seen.
    """

    name = "rank-normal"

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages."""
        return composed(report, self.options, _normal_scores)

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """Tiers and vetoes are rewards."""
        return unknown_reward(self.options, rewards)


class WinRateOptions(CompositionOptions):
    """Options of `winrate`."""

    margin: float = Field(
        0.0, ge=0, description="Two scores that differ by no more than this are a tie, in the rewards' own units."
    )


class WinRate(AdvantageEstimator[WinRateOptions]):
    """Per reward the share of its group that a sample beats, less the share that beats it; then the weighted sum.

    z_ik = mean_{j != i} sign(R_ik - R_jk), in [-1, 1], a tie counting 0: twice the win rate, less one (after the win
    rates of Pref-GRPO, arXiv:2508.20751). Groups whose scores are mostly tied have little to say, however small their
    spread.
    """

    name = "winrate"

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages in [-1, 1]."""
        return composed(report, self.options, self._wins)

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """Tiers and vetoes are rewards."""
        return unknown_reward(self.options, rewards)

    def _wins(self, scores: Comparable) -> Tensor:
        above, below, others = _compared(scores, self.options.margin)
        return (below - above) / others.clamp_min(1)


def _compared(scores: Comparable, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """[B R] how many of its group lie more than `margin` above and below each score, and how many others there are."""
    above, below = torch.zeros_like(scores.scores), torch.zeros_like(scores.scores)
    for p in range(len(scores.count)):
        rows = torch.nonzero(scores.group == p).flatten()
        own, counts = scores.scores[rows], scores.counts[rows].double()
        difference = own[None] - own[:, None]  # [i, j, R]: j less i
        above[rows] = ((difference > margin) * counts[None]).sum(1)
        below[rows] = ((difference < -margin) * counts[None]).sum(1)
    return above, below, (scores.count[scores.group] - 1).clamp_min(0)


def _normal_scores(scores: Comparable) -> Tensor:
    """[B R] Blom's scores; 0 for a group of equal ones."""
    above, below, others = _compared(scores, 0.0)
    rank = 1 + below + (others - above - below) / 2
    normal: Tensor = torch.special.ndtri((rank - 0.375) / (others + 1.25))
    return normal.where(scores.counts & (others > 0), 0)
