"""Advantages that remember how much scores usually vary: `reliability-z` and `pooled-std`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import AdvantageEstimator, Advantages, Calibration, Prompt, RewardReport, VelaturaError
from velatura.core.errors import suggest
from velatura.rewards.composition import Comparable, CompositionOptions, composed, per_group, unknown_reward

INFORMATIVE = 0.3
"""Correlations are learned from groups in which both rewards are at least this reliable."""
LEAST_VARIANCE = 0.01
"""Of a weighted sum: a matrix of correlations that was measured on few groups may say less, or nothing sensible."""
TINY = 1e-30
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(slots=True)
class Moments:
    """Exponentially weighted sums over groups, by category. A prompt of several categories counts in each by its share.

    Bit for bit the same when it is saved and read again: fp64, nothing else is remembered.
    """

    decay: float
    variance: dict[str, Tensor] = field(default_factory=dict)
    """Category -> [2 R]: squared deviations within groups, and their degrees of freedom."""
    products: dict[str, Tensor] = field(default_factory=dict)
    """Category -> [2 R R]: products of z-scores within groups, and how many groups."""

    def observe(self, kept: dict[str, Tensor], shares: Mapping[str, Tensor], sums: Tensor, counts: Tensor) -> None:
        """Take in [P ...] sums and counts of a batch; `shares`: category -> [P] membership of the groups."""
        for category, share in shares.items():
            weight = share.reshape(-1, *[1] * (sums.ndim - 1))
            new = torch.stack([(weight * sums).sum(0), (weight * counts).sum(0)])
            kept[category] = self.decay * kept[category] + new if category in kept else new

    def pooled(self, shares: Mapping[str, Tensor]) -> Tensor:
        """[P R] pooled within-group variance of each group's categories; 0 where nothing is known."""
        return mixed({c: self.variance[c][0] / self.variance[c][1].clamp_min(TINY) for c in shares}, shares)

    def correlation(self, shares: Mapping[str, Tensor], prior: float) -> Tensor:
        """[P R R]: (n_c Sigma_c + prior Sigma_pool) / (n_c + prior) of each group's categories."""
        total, count = torch.stack(list(self.products.values())).sum(0)
        pool = torch.where(count > 0, total / count.clamp_min(TINY), torch.eye(len(total), dtype=total.dtype))
        known = {c: self.products[c] for c in shares}
        return mixed({c: (s + prior * pool) / (n + prior) for c, (s, n) in known.items()}, shares)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything."""
        named = (("variance", self.variance), ("products", self.products))
        return {f"{name}/{category}": kept for name, own in named for category, kept in own.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        for key, kept in state.items():
            name, _, category = key.partition("/")
            (self.variance if name == "variance" else self.products)[category] = kept.clone()


class PooledStdOptions(CompositionOptions):
    """Options of `pooled-std`."""

    decay: float = Field(0.9, ge=0, lt=1, description="How much an earlier step counts in the pooled std, each step.")
    eps: float = Field(1e-8, gt=0, description="Added to variances, in the reward's own units squared.")


class PooledStd(AdvantageEstimator[PooledStdOptions]):
    """Deviations from the group's mean over the pooled within-group std of the category; then the weighted sum.

    z_ik = (R_ik - mu_gk) / sqrt(sbar_kc^2 + eps), sbar_kc a moving mean over the groups of category c. Groups that
    vary little move the model little, where a z-score gives every group the same say: after the std over a whole batch
    in Flow-GRPO's code (arXiv:2505.05470), which also counts how far apart the groups are.
    """

    name = "pooled-std"

    def __init__(self, options: PooledStdOptions | None = None) -> None:
        super().__init__(options)
        self._moments = Moments(decay=self.options.decay)

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages; learns the spread of this batch first."""
        shares = memberships(report.prompts)
        return composed(report, self.options, partial(self._standardise, shares))

    def _standardise(self, shares: Mapping[str, Tensor], scores: Comparable) -> Tensor:
        learn_variance(self._moments, shares, scores)
        return scores.centred / (self._moments.pooled(shares) + self.options.eps).sqrt()[scores.group]

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """Tiers and vetoes are rewards."""
        return unknown_reward(self.options, rewards)

    def state_dict(self) -> Mapping[str, Tensor]:
        """The pooled variances."""
        return self._moments.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self._moments.load_state_dict(state)


class ReliabilityZOptions(PooledStdOptions):
    """Options of `reliability-z`."""

    nu: float = Field(4.0, ge=0, description="How many samples the pooled variance counts for beside a group's own.")
    noise: dict[str, NotNegative | dict[str, NotNegative]] = Field(
        default_factory=dict,
        description="Reward -> std of its score of one and the same picture, or category -> std. What is left out "
        "comes from the stage's `weights_from`.",
    )
    prior_groups: float = Field(
        100.0, gt=0, description="How many groups the correlations of all categories count for beside a category's own."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unshrunk:
    """Standardised scores, before reliability."""

    z: Tensor
    """[B R]."""
    rho: Tensor
    """[P R] in [0, 1]."""


class ReliabilityZ(AdvantageEstimator[ReliabilityZOptions]):
    """Z-scores shrunk by how reliable they are, weighted, at unit variance for each category.

    shat^2 = ((n - 1) s_gk^2 + nu sbar_kc^2) / (n - 1 + nu),   rho = clip(1 - sigma_kc^2 / shat^2, 0, 1),
    z_ik = rho (R_ik - mu_gk) / sqrt(shat^2 + eps),   A_i = clip(sum_k w_k z_ik / sqrt(w' Sigma_c w), +-clip).

    sigma: how much the reward's score of one picture varies; sbar: moving mean over the groups of category c; w: the
    weights of the rewards that count for sample i, summing to 1; Sigma_c: correlations of the z-scores before rho,
    from the stage's calibration or a moving mean. A z-score alone gives a reward without signal as large a say as any.
    The combination is ours; the shrinkage is that of classical test theory.
    """

    name = "reliability-z"

    @classmethod
    def example(cls) -> Self:
        """For the two rewards of the reports of `velatura.testing`."""
        return cls(ReliabilityZOptions(noise={"reward-0": 0.05, "reward-1": 0.05}))

    _calibration: Calibration | None = None

    def __init__(self, options: ReliabilityZOptions | None = None) -> None:
        super().__init__(options)
        self._moments = Moments(decay=self.options.decay)

    def complaint(self, rewards: Mapping[str, float], *, calibrated: bool) -> str:
        """Tiers and vetoes are rewards, and the noise of each weighted reward is known."""
        for name in self.options.noise:
            if name not in rewards:
                return f"noise: no reward of this stage is called {name!r}.{suggest(name, rewards)}"
        unknown = [name for name, weight in rewards.items() if weight > 0 and name not in self.options.noise]
        if unknown and not calibrated:
            return (
                f"'reliability-z' has to know how noisy {', '.join(map(repr, unknown))} is. Name a calibrate stage in "
                f"'weights_from', or give noise: {{{unknown[0]}: 0.1}} (0 for a reward that always answers alike)"
            )
        return unknown_reward(self.options, rewards)

    def calibrate(self, calibration: Calibration) -> None:
        """Noise and correlations, where the options do not give them."""
        self._calibration = calibration

    def unprepared(self, weights: Mapping[str, Mapping[str, float]]) -> str:
        """The noise of each weighted reward is known in each category."""
        for category, own in weights.items():
            for name, weight in own.items():
                if weight > 0 and self._known_noise(name, category) is None:
                    return _unknown(name, category)
        return ""

    def estimate(self, report: RewardReport) -> Advantages:
        """[B] advantages; learns the spread and the correlations of this batch first."""
        shares = memberships(report.prompts)
        found: list[_Unshrunk] = []

        def standardise(scores: Comparable) -> Tensor:
            found.append(self._unshrunk(shares, scores, self._noise(report, shares)))
            learn_products(self._moments, shares, scores, found[0].z, found[0].rho)
            return found[0].rho[scores.group] * found[0].z

        def scale(weight: Tensor) -> Tensor:
            sigma = self._correlation(report, shares)[report.group]
            variance = torch.einsum("br,brs,bs->b", weight, sigma, weight)
            return variance.clamp_min(LEAST_VARIANCE).sqrt()[:, None]

        made = composed(report, self.options, standardise, scale=scale)
        return replace(made, metrics={**made.metrics, **_reliabilities(report, found[0].rho)})

    def state_dict(self) -> Mapping[str, Tensor]:
        """Pooled variances and correlations."""
        return self._moments.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self._moments.load_state_dict(state)

    def _unshrunk(self, shares: Mapping[str, Tensor], scores: Comparable, noise: Tensor) -> _Unshrunk:
        learn_variance(self._moments, shares, scores)
        free = (scores.count - 1).clamp_min(0)
        own, nu = scores.squares(), self.options.nu
        variance = (own + nu * self._moments.pooled(shares)) / (free + nu).clamp_min(TINY)
        rho = (1 - noise.square() / variance.clamp_min(TINY)).clamp(0, 1)
        return _Unshrunk(z=scores.centred / (variance + self.options.eps).sqrt()[scores.group], rho=rho)

    def _noise(self, report: RewardReport, shares: Mapping[str, Tensor]) -> Tensor:
        """[P R] std of the noise; of several categories the root of the mean variance."""
        weighted = per_group((report.weight > 0).double(), report.group, len(report.prompts)) > 0
        by_category = {
            category: torch.tensor(
                [
                    self._noise_of(name, category) ** 2 if asked else 0.0
                    for name, asked in zip(report.names, weighted[share > 0].any(0).tolist(), strict=True)
                ],
                dtype=torch.float64,
            )
            for category, share in shares.items()
        }
        return mixed(by_category, shares).sqrt()

    def _noise_of(self, name: str, category: str) -> float:
        known = self._known_noise(name, category)
        if known is None:
            raise VelaturaError(f"advantage 'reliability-z': {_unknown(name, category)}")
        return known

    def _known_noise(self, name: str, category: str) -> float | None:
        """Of a reward in a category, from the options or else from the calibration."""
        given = self.options.noise.get(name)
        if isinstance(given, Mapping):
            given = given.get(category)
        measured = self._calibration.noise.get(category, {}) if self._calibration is not None else {}
        return given if given is not None else measured.get(name)

    def _correlation(self, report: RewardReport, shares: Mapping[str, Tensor]) -> Tensor:
        """[P R R]."""
        if self._calibration is None:
            return self._moments.correlation(shares, self.options.prior_groups)
        known = {c: self._calibration.correlation(c, report.names).double() for c in shares}
        return mixed(known, shares)


def _unknown(name: str, category: str) -> str:
    return (
        f"the noise of reward {name!r} is not known for prompts of category {category!r}. Give it in `noise`, or "
        f"calibrate that category."
    )


def memberships(prompts: tuple[Prompt, ...]) -> dict[str, Tensor]:
    """Category -> [P] share of each prompt, over the categories that occur, in the order of their names."""
    own = [prompt.membership for prompt in prompts]
    names = sorted({category for shares in own for category in shares})
    return {c: torch.tensor([shares.get(c, 0.0) for shares in own], dtype=torch.float64) for c in names}


def mixed(by_category: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> Tensor:
    """[P ...]: sum_c share_pc value_c."""
    parts = [share.reshape(-1, *[1] * by_category[c].ndim) * by_category[c] for c, share in shares.items()]
    return torch.stack(parts).sum(0)


def learn_variance(moments: Moments, shares: Mapping[str, Tensor], scores: Comparable) -> None:
    """Take in the within-group variances of a batch."""
    free = (scores.count - 1) * scores.enough
    moments.observe(moments.variance, shares, scores.squares() * scores.enough, free)


def learn_products(moments: Moments, shares: Mapping[str, Tensor], scores: Comparable, z: Tensor, rho: Tensor) -> None:
    """Take in the within-group products of z-scores [B R], of groups in which both rewards are reliable enough."""
    groups, rewards = rho.shape
    known = z.where(scores.counts, 0)
    pairs = (known[:, :, None] * known[:, None, :]).flatten(1)
    both = (scores.counts[:, :, None] & scores.counts[:, None, :]).double().flatten(1)
    sums, count = (per_group(v, scores.group, groups).reshape(groups, rewards, rewards) for v in (pairs, both))
    telling = (rho > INFORMATIVE) & scores.enough
    usable = telling[:, :, None] & telling[:, None, :] & (count >= 2)
    moments.observe(moments.products, shares, (sums / (count - 1).clamp_min(1)).where(usable, 0), usable.double())


def _reliabilities(report: RewardReport, rho: Tensor) -> dict[str, float]:
    """Mean reliability of each reward that has a weight."""
    asked = (report.weight > 0).any(0).tolist()
    means = rho.mean(0).tolist()
    return {f"reliability/{n}": mean for n, mean, own in zip(report.names, means, asked, strict=True) if own}
