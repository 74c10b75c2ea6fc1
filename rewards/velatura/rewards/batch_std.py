"""Advantages over the spread of a whole batch: `gdpo` and `group-mean-global-std`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import AdvantageEstimator, Advantages, RewardReport
from velatura.rewards.composition import Comparable, CompositionOptions, composed, unknown_reward


class GdpoOptions(CompositionOptions):
    """Options of `gdpo`."""

    eps: float = Field(
        1e-4, gt=0, description="Least std of a group, in the reward's own units, and least std of the batch."
    )


class Gdpo(AdvantageEstimator[GdpoOptions]):
    """Per reward and group a z-score; their weighted sum over its std in the batch (GDPO, arXiv:2601.05242).

    z_ik = (R_ik - mu_gk) / max(sigma_gk, eps),   S_i = sum_k w_k z_ik / sum_k w_k,   A_i = clip(S_i / max(s, eps)),
    s the population std of S over the valid samples of the batch. The first two steps are `group-z` without its floor;
    the third makes the size of advantages the same whatever number of rewards disagrees. The source also subtracts the
    mean of S, which is 0 where all scores are there; where some are missing it would move whole groups, so it stays.
    """

    name = "gdpo"

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages of [B R] scores."""
        found: list[Tensor] = []

        def standardise(scores: Comparable) -> Tensor:
            std = (scores.squares() / scores.count.clamp_min(1)).sqrt().clamp_min(self.options.eps)
            found.append((scores.centred / std[scores.group]).where(scores.counts, 0))
            return found[0]

        return composed(report, self.options, standardise, scale=lambda share: _std(share, found[0], self.options.eps))

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """Tiers and vetoes are rewards."""
        return unknown_reward(self.options, rewards)


class GlobalStdOptions(CompositionOptions):
    """Options of `group-mean-global-std`."""

    eps: float = Field(1e-4, gt=0, description="Added to the std of the batch, in the units of the composite reward.")


class GroupMeanGlobalStd(AdvantageEstimator[GlobalStdOptions]):
    """The composite reward less its group's mean, over its std in the batch (Flow-GRPO, arXiv:2505.05470).

    A_i = clip((R_i - mu_g) / (s + eps)), R_i = sum_k w_k R_ik / sum_k w_k, s the population std of R over all valid
    samples of the batch, whatever their prompt: easy and hard prompts widen it, so advantages are smaller than those of
    `group-z`, and groups that hardly vary move little. Rewards are summed raw: give them one scale. The source's std is
    of one batch; `pooled-std` is that within groups, remembered.
    """

    name = "group-mean-global-std"

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages of [B R] scores."""
        found: list[Tensor] = []

        def centred(scores: Comparable) -> Tensor:
            found.append(scores.scores)
            return scores.centred

        return composed(
            report, self.options, centred, scale=lambda share: _std(share, found[0], 0.0) + self.options.eps
        )

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """Tiers and vetoes are rewards."""
        return unknown_reward(self.options, rewards)


def _std(share: Tensor, values: Tensor, least: float) -> Tensor:
    """[B 1] of one number: the population std of sum_k share_ik values_ik over the samples with a share, at least
    `least`; 1 where there is no such sample."""
    valid = share.sum(1) > 0
    sums = (share * values).sum(1)[valid]
    std = sums.std(correction=0) if len(sums) else torch.ones((), dtype=share.dtype)
    return std.clamp_min(least).expand(len(share))[:, None]
