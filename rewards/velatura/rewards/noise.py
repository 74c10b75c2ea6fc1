"""How much a reward differs from itself: its test-retest standard deviation, and what of it is in a composite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from velatura.api import RewardReport, Status, VelaturaError
from velatura.core.errors import suggest


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Standard deviation of each reward over repeated passes, by category; of some it is not known."""

    sigma: Mapping[tuple[str, str], float]
    """(reward, category) -> sigma."""

    def of_prompt(self, report: RewardReport, rows: Tensor) -> float:
        """Of the composite of one prompt's samples `rows`: sqrt(sum_k (w_k / sum w)^2 sigma_k^2). 0 where no reward's
        noise is known, or none is valid."""
        share = weight_shares(report, rows)
        category = report.prompts[int(report.group[rows[0]])].category
        known = [self.sigma.get((name, category), 0.0) for name in report.names]
        return math.sqrt(sum((w * s) ** 2 for w, s in zip(share, known, strict=True)))


def noise_of(report: RewardReport, given: Mapping[str, float]) -> Noise:
    """What is `given` for a reward; for others what the report's repeated passes say: the mean over the samples of a
    category of the variance between passes.

    Raises:
        VelaturaError: a name is none of the report's.
    """
    for name in given:
        if name not in report.names:
            raise VelaturaError(f"`noise` names {name!r}, which is no reward here.{suggest(name, report.names)}")
    categories = [prompt.category for prompt in report.prompts]
    sigma = {(name, category): value for name, value in given.items() for category in categories}
    if report.repeats is None:
        return Noise(sigma=sigma)
    of_sample = [categories[int(row)] for row in report.group]
    variance = torch.cat([scored(report)[None], report.repeats]).double().var(dim=0)  # NaN where a pass has none
    for r, name in enumerate(report.names):
        for category in set(categories) if name not in given else ():
            own = variance[[c == category for c in of_sample], r]
            known = own[~own.isnan()]
            if len(known):
                sigma[name, category] = math.sqrt(float(known.mean()))
    return Noise(sigma=sigma)


def weight_shares(report: RewardReport, rows: Tensor) -> list[float]:
    """[R] share of each reward in the composite, the mean over the samples `rows`; they sum to 1 or are all 0."""
    active = (report.weight[rows] * (report.status[rows] == int(Status.OK))).double()
    total = active.sum(1, keepdim=True)
    used = active[total[:, 0] > 0] / total[total[:, 0] > 0]
    return [0.0] * len(report.names) if len(used) == 0 else [float(share) for share in used.mean(0)]


def scored(report: RewardReport) -> Tensor:
    """[B R] scores, NaN where there is none."""
    return torch.where(report.valid, report.scores, torch.nan)


def composites(report: RewardReport) -> Tensor:
    """[K + 1, B] composite of each pass over the samples, NaN where it is not complete."""
    passes = [report.composite]
    for again in report.repeats if report.repeats is not None else ():
        lost = report.valid & again.isnan()
        status = torch.where(lost, int(Status.FAILED), report.status)
        passes.append(replace(report, scores=again.nan_to_num(), status=status, repeats=None).composite)
    return torch.stack(passes).double()
