"""What a calibrate stage found, as others use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a calibrate stage measured and decided, for the stages that take their weights from it."""

    names: tuple[str, ...]
    """[M] rewards, then guards."""
    weights: Mapping[str, Mapping[str, float]]
    """Category -> reward -> weight of its standardised score, summing to 1."""
    noise: Mapping[str, Mapping[str, float]]
    """Category -> name -> std of the score of one and the same picture; what does not apply there is left out."""
    spread: Mapping[str, Mapping[str, float]]
    """Category -> name -> pooled std of the scores within a group."""
    sigma: Mapping[str, Tensor]
    """Category -> [M M] correlations of standardised scores within a group; 0 beside the diagonal where not known."""

    budgets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Category -> reward -> share of the advantage's variance that it is to have, as written or as people's choices
    say."""

    def correlation(self, category: str, rewards: Sequence[str]) -> Tensor:
        """[R R] of some rewards in this order; those it does not know are correlated with nothing."""
        known = {name: i for i, name in enumerate(self.names)}
        found = torch.eye(len(rewards), dtype=torch.float64)
        for i, one in enumerate(rewards):
            for j, other in enumerate(rewards):
                if one in known and other in known:
                    found[i, j] = self.sigma[category][known[one], known[other]]
        return found
