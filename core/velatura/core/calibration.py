"""From scores of groups to reward weights: noise, correlations, risk budgets, and no guarded reward pushed down.

A reward's weight does not say how much it moves the policy: a reward that agrees with others moves it with them. What
people can state is a budget, the share of the advantage's variance that a reward is to have in a category; the
weights that give these shares are found here. Pure numbers; nothing is drawn or scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from velatura.core.errors import VelaturaError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NU = 4.0
"""How many samples the pooled variance counts for beside a group's own, as in the advantage `reliability-z`."""
INFORMATIVE = 0.3
"""Correlations are measured on groups in which both rewards are at least this reliable."""
EXACT = 1e-5
"""Largest difference of a share from its budget that a solution may have."""
SLACK = 1e-7
"""By how much a constraint may be missed: rounding of the solver."""
FLOOR = 1e-6
"""Least eigenvalue of a matrix of correlations whose entries come from different groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Scores of B samples in P groups by M rewards, each sample scored S times."""

    names: tuple[str, ...]
    """[M] rewards, then guards."""
    scores: Floats
    """[S B M]; meaningless where not valid."""
    valid: Bools
    """[S B M]."""
    group: NDArray[np.int64]
    """[B]."""
    shares: Mapping[str, Floats]
    """Category -> [P] how much of each group belongs to it."""

    @property
    def groups(self) -> int:
        """P."""
        return len(next(iter(self.shares.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What the groups of a calibration say."""

    noise: Mapping[str, Floats]
    """Category -> [M] std of the score of one picture; NaN where no picture was scored twice."""
    spread: Mapping[str, Floats]
    """Category -> [M] pooled within-group std; NaN where nothing was scored."""
    reliability: Mapping[str, Floats]
    """Category -> [M] mean over groups of clip(1 - sigma^2 / shat^2, 0, 1)."""
    products: Floats
    """[P M M] within-group products of standardised scores, before reliability."""
    telling: Bools
    """[P M M] groups in which both rewards are reliable enough for `products` to mean something."""
    shrunk: Floats
    """[P M M] the same products after reliability: what an update will do."""
    joint: Bools
    """[P M M] groups in which both were scored."""


def statistics(measured: Measured, noise: Mapping[str, Floats] | None = None) -> Statistics:
    """Noise, spread, reliability and the products that correlations are means of. The first pass is what counts.

    `noise`: category -> [M], where it is known from elsewhere.
    """
    if noise is None:
        noise = {c: _noise(measured, share) for c, share in measured.shares.items()}
    valid = measured.valid[0]
    count = _per_group(valid.astype(float), measured)
    scores = np.where(valid, measured.scores[0], 0.0)
    mean = _per_group(scores, measured) / np.maximum(count, 1)
    centred = np.where(valid & (count >= 2)[measured.group], scores - mean[measured.group], 0.0)
    squares, free = _per_group(centred**2, measured), np.maximum(count - 1, 0)
    pooled = {c: _ratio(share @ squares, share @ free) for c, share in measured.shares.items()}
    mixture = _mixed({c: np.nan_to_num(own) for c, own in pooled.items()}, measured)
    variance = np.where(free > 0, (squares + NU * mixture) / (free + NU), 0.0)
    sigma2 = _mixed({c: np.nan_to_num(own) ** 2 for c, own in noise.items()}, measured)
    rho = np.clip(1 - sigma2 / np.maximum(variance, 1e-30), 0, 1) * (free > 0)
    z = centred / np.sqrt(np.maximum(variance, 1e-30))[measured.group]
    z = np.where(variance[measured.group] > 0, z, 0.0)
    products, joint = _products(z, valid, measured)
    shrunk, _ = _products(z * rho[measured.group], valid, measured)
    telling = (rho > INFORMATIVE)[:, :, None] & (rho > INFORMATIVE)[:, None, :] & joint
    return Statistics(
        noise=noise,
        spread={c: np.sqrt(own) for c, own in pooled.items()},
        reliability={c: _ratio(share @ rho, share @ (free > 0)) for c, share in measured.shares.items()},
        products=products, telling=telling, shrunk=shrunk, joint=joint,
    )  # fmt: skip


def correlations(found: Statistics, share: Floats, *, prior: float, shrunk: bool = False) -> Floats:
    """[M M]: (n_c Sigma_c + prior Sigma_pool) / (n_c + prior), n_c the groups of the category that say something.

    Sigma_c is the mean within-group product over them; Sigma_pool that over all groups, and where there are none the
    identity. With `shrunk`, of scores after reliability and over all groups; there what is not known is 0.
    """
    products, usable = (found.shrunk, found.joint) if shrunk else (found.products, found.telling)
    total, count = np.where(usable, products, 0.0).sum(0), usable.sum(0)
    unknown = np.zeros(total.shape) if shrunk else np.eye(len(total))
    pool = np.where(count > 0, total / np.maximum(count, 1), unknown)
    own = np.einsum("p,pkl->kl", share, np.where(usable, products, 0.0))
    number = np.einsum("p,pkl->kl", share, usable.astype(float))
    return _semidefinite((own + prior * pool) / (number + prior))


def risk_budget(sigma: Floats, budget: Floats) -> Floats:
    """[K] weights, summing to 1, of which reward k has the share b_k of the variance of the weighted sum.

    w_k (Sigma w)_k / (w' Sigma w) = b_k. The minimum of 1/2 w' Sigma w - sum_k b_k log w_k over w > 0, which is
    strictly convex, in log w by BFGS; then scaled. A budget of 0 gives a weight of 0.

    Raises:
        VelaturaError: Sigma is so nearly singular that no solution was found.
    """
    from scipy import optimize

    active = budget > 0
    matrix, wanted = sigma[np.ix_(active, active)], budget[active]

    def energy(y: Floats) -> tuple[float, Floats]:
        w = np.exp(np.clip(y, -40, 40))
        pull = matrix @ w
        return float(0.5 * w @ pull - wanted @ y), w * pull - wanted

    start = 0.5 * np.log(wanted / np.diag(matrix))
    solved = optimize.minimize(energy, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 1000})
    w = np.exp(solved.x)
    found = np.zeros(len(budget))
    found[active] = w / w.sum()
    if np.abs(risk_shares(sigma, found) - budget).max() > EXACT:
        raise VelaturaError(f"no weights have the shares {budget.tolist()} under the correlations {sigma.tolist()}")
    return found


def risk_shares(sigma: Floats, weights: Floats) -> Floats:
    """[K] w_k (Sigma w)_k / (w' Sigma w): each reward's share of the variance of the weighted sum."""
    pull = sigma @ weights
    return np.asarray(weights * pull / (weights @ pull))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unharmed:
    """Weights under which no guarded reward falls, or the best there are."""

    weights: Floats
    """[K], summing to 1."""
    correlation: Floats
    """[M] of the weighted sum with each reward and guard; NaN where one never varies."""
    is_feasible: bool


def no_harm(sigma: Floats, start: Floats, kappa: float) -> Unharmed:
    """The weights nearest to `start` [K] under which every one of M rewards and guards correlates at least `kappa`.

    min (w - w*)' Sigma (w - w*)  s.t.  w >= 0, 1'w = 1, (Sigma w)_k >= kappa sqrt(Sigma_kk w' Sigma w) for all k.
    To first order a step along the weighted sum moves reward k by their covariance, so none falls. `sigma` [M M], the
    first K rows are those with a weight; those that start at 0 stay there. Infeasible: the weights of the largest
    least correlation.
    """
    free = start > 0
    if _least(sigma, start) >= kappa - SLACK:
        return Unharmed(weights=start, correlation=correlation_with(sigma, start), is_feasible=True)
    best = _max_min(sigma, start, free)
    if _least(sigma, best) < kappa - SLACK:
        return Unharmed(weights=best, correlation=correlation_with(sigma, best), is_feasible=False)
    from scipy import optimize

    guarded = np.diag(sigma) > FLOOR
    trained = sigma[: len(start), : len(start)]

    def room(w: Floats) -> Floats:
        pull = sigma[:, : len(w)] @ w
        return np.asarray((pull - kappa * np.sqrt(np.diag(sigma) * max(float(w @ trained @ w), 1e-30)))[guarded])

    def distance(w: Floats) -> tuple[float, Floats]:
        gap = w - start
        return float(gap @ trained @ gap), 2 * trained @ gap

    solved = optimize.minimize(
        distance, best, jac=True, method="SLSQP", bounds=[(0, float(own)) for own in free], options={"ftol": 1e-14},
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}, {"type": "ineq", "fun": room}],
    )  # fmt: skip
    nearest = _normalised(solved.x)
    w = nearest if _least(sigma, nearest) >= kappa - 1e-4 else best
    return Unharmed(weights=w, correlation=correlation_with(sigma, w), is_feasible=True)


def sigma_hash(sigma: Floats) -> str:
    """Names a matrix in the ledger."""
    return hashlib.sha256(np.round(sigma, 9).tobytes()).hexdigest()[:16]


def standard_errors(
    found: Statistics, share: Floats, rows: Sequence[int], budget: Floats, *, prior: float, resamples: int, seed: int
) -> Floats:
    """[K] bootstrap standard errors over groups of the risk-budget weights of the rewards `rows`."""
    rng, chosen = np.random.default_rng(seed), np.ix_(rows, rows)
    drawn = []
    for _ in range(resamples):
        pick = rng.integers(0, len(share), len(share))
        again = Statistics(
            noise={}, spread={}, reliability={}, products=found.products[pick], telling=found.telling[pick],
            shrunk=found.shrunk[pick], joint=found.joint[pick],
        )  # fmt: skip
        drawn.append(risk_budget(correlations(again, share[pick], prior=prior)[chosen], budget))
    return np.asarray(np.std(drawn, axis=0, ddof=1)) if len(drawn) > 1 else np.full(len(budget), np.nan)


def correlation_with(sigma: Floats, w: Floats) -> Floats:
    """[M] of the sum that the first rewards make under weights `w` [K] with everything; NaN where one never varies."""
    pull = sigma[:, : len(w)] @ w
    scale = np.sqrt(np.diag(sigma) * max(float(w @ pull[: len(w)]), 1e-30))
    return np.where(np.diag(sigma) > FLOOR, pull / np.maximum(scale, 1e-15), np.nan)


def _least(sigma: Floats, w: Floats) -> float:
    """The least correlation with anything that varies; infinite where nothing does."""
    found = correlation_with(sigma, w)
    known = found[~np.isnan(found)]
    return float(known.min()) if len(known) else np.inf


def _max_min(sigma: Floats, start: Floats, free: Bools) -> Floats:
    """The weights of the largest least correlation: max t s.t. corr_k >= t, from several starts by SLSQP."""
    from scipy import optimize

    count = len(start)
    guarded = np.diag(sigma) > FLOOR
    even = free / free.sum()
    starts = [start, even, *(0.8 * np.eye(count)[k] + 0.2 * even for k in np.flatnonzero(free))]
    best: Floats = max(starts, key=lambda w: _least(sigma, w))
    for w0 in starts:
        solved = optimize.minimize(
            lambda x: -x[-1], np.append(w0, _least(sigma, w0)), jac=lambda x: -np.eye(count + 1)[-1], method="SLSQP",
            bounds=[*((0, float(own)) for own in free), (-1, 1)], options={"ftol": 1e-12, "maxiter": 300},
            constraints=[
                {"type": "eq", "fun": lambda x: x[:-1].sum() - 1},
                {"type": "ineq", "fun": lambda x: (correlation_with(sigma, x[:-1]) - x[-1])[guarded]},
            ],
        )  # fmt: skip
        if np.isfinite(solved.x).all() and solved.x[:-1].sum() > 0:
            best = max(best, _normalised(solved.x[:-1]), key=lambda w: _least(sigma, w))
    return best


def _normalised(w: Floats) -> Floats:
    positive = np.clip(w, 0, None)
    return np.asarray(positive / positive.sum())


def _noise(measured: Measured, share: Floats) -> Floats:
    """[M] root of the mean variance of a picture's scores over the passes in which it was scored."""
    valid = measured.valid
    count = valid.sum(0)
    mean = np.where(valid, measured.scores, 0.0).sum(0) / np.maximum(count, 1)
    squares = np.where(valid, (measured.scores - mean) ** 2, 0.0).sum(0)
    weight = share[measured.group]
    return np.sqrt(_ratio(weight @ squares, weight @ np.maximum(count - 1, 0)))


def _per_group(values: Floats, measured: Measured) -> Floats:
    """[P ...] sums of [B ...]."""
    sums = np.zeros((measured.groups, *values.shape[1:]))
    np.add.at(sums, measured.group, values)
    return sums


def _products(z: Floats, valid: Bools, measured: Measured) -> tuple[Floats, Bools]:
    """[P M M] sum_i z_ik z_il / (n - 1) over the samples that both scored, and whether there were two."""
    both = valid[:, :, None] & valid[:, None, :]
    count = _per_group(both.astype(float), measured)
    sums = _per_group(np.where(both, z[:, :, None] * z[:, None, :], 0.0), measured)
    return sums / np.maximum(count - 1, 1), count >= 2


def _mixed(by_category: Mapping[str, Floats], measured: Measured) -> Floats:
    """[P M]."""
    mixture = np.zeros((measured.groups, len(measured.names)))
    for category, share in measured.shares.items():
        mixture += np.outer(share, by_category[category])
    return mixture


def _ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, NaN of nothing."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)


def _semidefinite(sigma: Floats) -> Floats:
    """The symmetric matrix with eigenvalues raised to a floor: entries from different groups need not fit together."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    if values[0] >= FLOOR or not sigma.any():
        return np.asarray((sigma + sigma.T) / 2)
    silent = np.diag(sigma) <= 0
    found = np.asarray((vectors * np.maximum(values, FLOOR)) @ vectors.T)
    found[silent, :], found[:, silent] = 0.0, 0.0
    return found
