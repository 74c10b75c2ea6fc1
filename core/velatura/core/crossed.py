"""The mean over two crossed sources of chance: training seeds, and the prompts that each seed's model is tried on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossed:
    """A mean over seeds and prompts with its 95 % interval over both."""

    value: float
    low: float
    """NaN with one seed or one prompt."""
    high: float
    by_seed: tuple[float, ...]
    """Mean over prompts of each seed."""
    n_prompts: int


def crossed_mean(values: Floats) -> Crossed:
    """Mean of `values` [seeds prompts], as a two-way layout with random rows and columns and one value in each cell.

    With mean squares of seeds, prompts and the rest, Var(mean) = (MS_s + MS_p - MS_e) / (S P) (Cornfield and Tukey
    1956), taken as no less than either source alone gives; degrees of freedom after Satterthwaite (1946). Seeds alone
    would forget that other prompts would have given other differences; prompts alone, that another training would.

    Prompts with a NaN in any seed are left out.
    """
    known = values[:, np.isfinite(values).all(axis=0)]
    seeds, prompts = known.shape
    by_seed = tuple(float(v) for v in known.mean(axis=1)) if prompts else (math.nan,) * seeds
    mean = float(known.mean()) if prompts else math.nan
    if seeds < 2 or prompts < 2:
        return Crossed(value=mean, low=math.nan, high=math.nan, by_seed=by_seed, n_prompts=prompts)
    rows, columns = known.mean(axis=1), known.mean(axis=0)
    rest = known - rows[:, None] - columns[None, :] + mean
    of_seeds = prompts * float(rows.var(ddof=1))
    of_prompts = seeds * float(columns.var(ddof=1))
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
    square = max(of_seeds + of_prompts - of_rest, of_seeds, of_prompts)
    if square <= 1e-24:
        return Crossed(value=mean, low=mean, high=mean, by_seed=by_seed, n_prompts=prompts)
    spread = of_seeds**2 / (seeds - 1) + of_prompts**2 / (prompts - 1)
    spread += of_rest**2 / ((seeds - 1) * (prompts - 1)) if square > max(of_seeds, of_prompts) else 0.0
    freedom = square**2 / spread if spread else float(seeds - 1)
    from scipy import stats

    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(square / (seeds * prompts))
    return Crossed(value=mean, low=mean - half, high=mean + half, by_seed=by_seed, n_prompts=prompts)
