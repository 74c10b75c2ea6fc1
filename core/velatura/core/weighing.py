"""From what a calibration measured to the weights of each category, with a reason for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from velatura.core.calibration import (
    Floats,
    Measured,
    Statistics,
    Unharmed,
    correlations,
    no_harm,
    risk_budget,
    risk_shares,
    sigma_hash,
    standard_errors,
)

FEW = 20
"""Groups that say something about a pair of rewards; with fewer the correlations of all categories decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How weights are found."""

    rewards: int
    """How many of the names are rewards; guards follow."""
    prior: float
    """Groups that the correlations of all categories count for."""
    kappa: float
    """Least correlation of the advantage with every reward and guard."""
    bootstrap: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """The weights of one category, and what they do there. All columns have M entries, rewards and then guards."""

    category: str
    groups: float
    """Groups that belong to it; of a prompt of several categories its share."""
    budget: Floats
    """0 for guards."""
    start: Floats
    """Weights that realise the budget."""
    weights: Floats
    """Those after nobody is harmed."""
    error: Floats
    """Bootstrap standard errors of `start`; NaN for guards."""
    share: Floats
    """Of the variance of the weighted sum, under the final weights."""
    correlation: Floats
    """Of the advantage with each; NaN where one never varies."""
    sigma: Floats
    """[M M] correlations before reliability."""
    sigma_hash: str
    is_conflicting: bool
    """No weights leave every reward and guard unharmed."""
    reason: str


def weigh(
    measured: Measured, found: Statistics, category: str, budget: Mapping[str, float], rules: Rules, origin: str
) -> Weighed:
    """Weights of one category. `origin`: where its budget comes from, for the reason."""
    names, share = measured.names, measured.shares[category]
    wanted = np.array([budget.get(name, 0.0) for name in names[: rules.rewards]])
    wanted = wanted / wanted.sum()
    sigma, update = matrices(measured, found, category, rules)
    trained = sigma[: rules.rewards, : rules.rewards]
    start = risk_budget(trained, wanted)
    kept = no_harm(update, start, rules.kappa)
    active = [k for k in range(rules.rewards) if wanted[k] > 0]
    error = np.full(len(names), np.nan)
    error[active] = standard_errors(
        found, share, active, wanted[active], prior=rules.prior, resamples=rules.bootstrap, seed=rules.seed
    )
    number = np.einsum("p,pkl->kl", share, found.telling.astype(float))[np.ix_(active, active)].min()
    remarks = _remarks(names, start, kept, rules, number)
    return Weighed(
        category=category, groups=float(share.sum()), budget=_padded(wanted, names), start=_padded(start, names),
        weights=_padded(kept.weights, names), error=error, share=_padded(risk_shares(trained, kept.weights), names),
        correlation=kept.correlation, sigma=sigma, sigma_hash=sigma_hash(sigma), is_conflicting=not kept.is_feasible,
        reason="; ".join([origin, *remarks]),
    )  # fmt: skip


def matrices(measured: Measured, found: Statistics, category: str, rules: Rules) -> tuple[Floats, Floats]:
    """[M M] correlations of a category before reliability, for budgets; and after it, which say what an update does."""
    share = measured.shares[category]
    sigma = correlations(found, share, prior=rules.prior)
    update = correlations(found, share, prior=rules.prior, shrunk=True)
    silent = np.isnan(found.spread[category])  # does not apply here: what other categories say is beside the point
    update[silent, :], update[:, silent] = 0.0, 0.0
    return sigma, update


def _remarks(names: Sequence[str], start: Floats, kept: Unharmed, rules: Rules, number: float) -> list[str]:
    """What a reader should know of the weights."""
    found = []
    if not kept.is_feasible:
        worst = int(np.nanargmin(kept.correlation))
        found.append(
            f"conflicting: whatever the weights, something falls; {names[worst]} at a correlation of "
            f"{kept.correlation[worst]:+.2f} is the best there is. Consider a teacher of its own"
        )
    elif (kept.weights != start).any():
        found.append(f"moved from the budget so that every correlation is at least {rules.kappa:g}")
    if number < FEW:
        found.append(f"only {number:.0f} groups say something of some pair of rewards, so all categories decide")
    return found


def _padded(values: Floats, names: Sequence[str]) -> Floats:
    return np.concatenate([values, np.zeros(len(names) - len(values))])
