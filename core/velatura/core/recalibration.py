"""Weights that follow the policy: what a calibrate stage measured on the first policy is measured again on later ones.

A budget is a share of the advantage's variance, so it depends on how rewards agree on the samples of a policy, and
that changes while it learns. The groups that are trained on are scored anyway; weights are found anew from them, every
so many optimiser steps, or as soon as a reward's share has drifted or a reward or guard begins to be pushed down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from velatura.core.calibrated import Calibration
from velatura.core.calibration import Floats, Measured, Statistics, correlation_with, risk_shares, statistics
from velatura.core.reward_settings import Recalibrate
from velatura.core.types import RewardReport, group_rows
from velatura.core.weighing import FEW, Rules, Weighed, matrices, weigh


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the latest groups say of the weights of one category."""

    measured: Measured
    found: Statistics
    why: str
    """Why its weights are to be found anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """Weights found anew."""

    number: int
    weighed: Weighed
    found: Statistics


@dataclass(slots=True)
class Recalibrator:
    """Remembers the latest groups, and finds the weights of each category anew when its time has come.

    A category is looked at when it has `groups` groups since its last look, or `every` optimiser steps have passed and
    there are enough to say anything. Its weights move towards those that its budget asks for, each by `max_change` at
    most, and stay where no change is larger than its standard error. Noise is not measured again: it is the rewards',
    not the policy's.
    """

    settings: Recalibrate
    rules: Rules
    calibration: Calibration
    """What advantages go by now."""
    every: int
    """Steps of the loop after which a category is looked at whatever has changed."""
    version: int = 0
    _looked: dict[str, int] = field(default_factory=dict)
    _aim: dict[str, Floats] = field(default_factory=dict)
    """Category -> [K] shares of the variance that its weights were last meant to have."""
    _falling: dict[str, bool] = field(default_factory=dict)
    """Category -> whether something was pushed down when it was last looked at."""
    _scores: list[Floats] = field(default_factory=list)
    """[G M] of each group, NaN where there is no score."""
    _shares: list[Floats] = field(default_factory=list)
    """[C] of each group."""
    _steps: list[int] = field(default_factory=list)
    """In which step it was drawn."""

    def __post_init__(self) -> None:
        """As the calibrate stage left it."""
        for category in self.categories:
            self._looked.setdefault(category, -1)
            self._aim.setdefault(category, self._expected(category))
            self._falling.setdefault(category, False)

    @property
    def categories(self) -> list[str]:
        """In the order of their columns."""
        return sorted(self.calibration.weights)

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """Reward -> category -> weight."""
        names = self.calibration.names[: self.rules.rewards]
        return {n: {c: own.get(n, 0.0) for c, own in self.calibration.weights.items()} for n in names}

    def observe(self, step: int, report: RewardReport) -> None:
        """Remember the groups of a step; of each category the latest `groups` are kept."""
        columns = {name: r for r, name in enumerate(report.names)}
        valid = report.scores.double().masked_fill(~report.valid, torch.nan).numpy()
        nothing = np.full(len(valid), np.nan)
        every = np.stack([valid[:, columns[n]] if n in columns else nothing for n in self.calibration.names], axis=1)
        for prompt, rows in zip(report.prompts, group_rows(report.group, len(report.prompts)), strict=True):
            share = prompt.membership
            self._scores.append(every[rows.numpy()])
            self._shares.append(np.array([share.get(category, 0.0) for category in self.categories]))
            self._steps.append(step)
        self._forget()

    def decide(self, step: int) -> list[Version]:
        """The weights that change after `step`; from the next one on they count."""
        made = []
        for category in self.categories:
            look = self._look(category, step)
            if look is None:
                continue
            self._looked[category] = step
            weighed = self._moved(category, look)
            if weighed is not None:
                self.version += 1
                self._take(weighed)
                made.append(Version(number=self.version, weighed=weighed, found=look.found))
        return made

    def _look(self, category: str, step: int) -> Look | None:
        """What the groups since its last look say; None where they say nothing, or nothing new."""
        due = step - self._looked[category] >= self.every
        rows = [i for i, at in enumerate(self._steps) if at > self._looked[category]]
        column = self.categories.index(category)
        count = sum(self._shares[i][column] for i in rows)
        if count < (FEW if due else self.settings.groups):
            return None
        measured = self._measured(rows)
        found = statistics(measured, {c: self._noise(c) for c in self.categories})
        why = self._why(category, measured, found)
        if not why and not due:
            return None
        return Look(measured=measured, found=found, why=why or f"{self.settings.every} optimiser steps have passed")

    def _why(self, category: str, measured: Measured, found: Statistics) -> str:
        """What has changed under the weights of a category; empty where nothing has."""
        names, weights = self.calibration.names, self._weights(category)
        sigma, update = matrices(measured, found, category, self.rules)
        count = self.rules.rewards
        gap = risk_shares(sigma[:count, :count], weights) - self._aim[category]
        effect = correlation_with(update, weights)
        falls = bool((np.nan_to_num(effect) < 0).any())
        before, self._falling[category] = self._falling[category], falls
        if falls and not before:
            worst = int(np.nanargmin(effect))
            return f"{names[worst]} is pushed down, at a correlation of {effect[worst]:+.2f}"
        largest = int(np.abs(gap).argmax())
        if abs(gap[largest]) > self.settings.drift:
            return f"the share of {names[largest]} has moved by {gap[largest]:+.0%}"
        return ""

    def _moved(self, category: str, look: Look) -> Weighed | None:
        """Weights nearer to those of the budget; None where that is no certain change."""
        budget = self.calibration.budgets[category]
        wanted = weigh(look.measured, look.found, category, budget, self.rules, look.why)
        count, before = self.rules.rewards, self._weights(category)
        trained = wanted.sigma[:count, :count]
        self._aim[category] = risk_shares(trained, wanted.weights[:count])
        change = wanted.weights[:count] - before
        if bool((np.abs(change) <= np.nan_to_num(wanted.error[:count])).all()):
            return None
        part = min(1.0, self.settings.max_change / float(np.abs(change).max()))
        after = before + part * change
        reason = wanted.reason if part == 1 else f"{wanted.reason}; {part:.0%} of the way, the most at a time"
        _, update = matrices(look.measured, look.found, category, self.rules)
        rest = np.zeros(len(wanted.weights) - count)
        return replace(
            wanted, weights=np.append(after, rest), share=np.append(risk_shares(trained, after), rest),
            correlation=correlation_with(update, after), reason=reason,
        )  # fmt: skip

    def _take(self, weighed: Weighed) -> None:
        """From now on these are the weights and correlations of their category."""
        own = dict(zip(self.calibration.names, weighed.weights[: self.rules.rewards].tolist(), strict=False))
        sigma = torch.from_numpy(weighed.sigma.copy())
        self._set(weighed.category, own, sigma)

    def _set(self, category: str, weights: Mapping[str, float], sigma: Tensor) -> None:
        self.calibration = replace(
            self.calibration, weights={**self.calibration.weights, category: dict(weights)},
            sigma={**self.calibration.sigma, category: sigma},
        )  # fmt: skip

    def _measured(self, rows: Sequence[int]) -> Measured:
        """These groups as a calibrate stage has them, scored once."""
        scores = np.concatenate([self._scores[i] for i in rows])[None]
        shares = np.stack([self._shares[i] for i in rows])
        return Measured(
            names=self.calibration.names, scores=np.nan_to_num(scores), valid=~np.isnan(scores),
            group=np.repeat(np.arange(len(rows)), [len(self._scores[i]) for i in rows]),
            shares={category: shares[:, c] for c, category in enumerate(self.categories)},
        )  # fmt: skip

    def _weights(self, category: str) -> Floats:
        """[K]."""
        own = self.calibration.weights[category]
        return np.array([own.get(name, 0.0) for name in self.calibration.names[: self.rules.rewards]])

    def _noise(self, category: str) -> Floats:
        """[M]."""
        own = self.calibration.noise[category]
        return np.array([own.get(name, math.nan) for name in self.calibration.names])

    def _expected(self, category: str) -> Floats:
        """[K] shares under the correlations that the calibrate stage measured."""
        count = self.rules.rewards
        return risk_shares(self.calibration.sigma[category].numpy()[:count, :count], self._weights(category))

    def _forget(self) -> None:
        """Groups beyond the latest of their largest category."""
        left = dict.fromkeys(range(len(self.categories)), self.settings.groups)
        kept = []
        for i in range(len(self._steps) - 1, -1, -1):
            own = int(self._shares[i].argmax())
            left[own] -= 1
            if left[own] >= 0:
                kept.append(i)
        kept.reverse()
        self._scores = [self._scores[i] for i in kept]
        self._shares = [self._shares[i] for i in kept]
        self._steps = [self._steps[i] for i in kept]

    def state_dict(self) -> Mapping[str, Tensor]:
        """Everything, in doubles."""
        facts = [[self._looked[c], self._falling[c]] for c in self.categories]
        state = {
            "version": torch.tensor(self.version), "categories": torch.tensor(facts, dtype=torch.int64),
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "weights": torch.from_numpy(np.stack([self._weights(c) for c in self.categories])),
            "aim": torch.from_numpy(np.stack([self._aim[c] for c in self.categories])),
            "sigma": torch.stack([self.calibration.sigma[c] for c in self.categories]),
        }  # fmt: skip
        if self._steps:
            state["scores"] = torch.from_numpy(np.stack(self._scores))
            state["shares"] = torch.from_numpy(np.stack(self._shares))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.version, self._steps = int(state["version"]), state["steps"].tolist()
        self._scores = list(state["scores"].numpy()) if self._steps else []
        self._shares = list(state["shares"].numpy()) if self._steps else []
        for c, category in enumerate(self.categories):
            looked, falling = state["categories"][c].tolist()
            self._looked[category], self._falling[category] = int(looked), bool(falling)
            self._aim[category] = state["aim"][c].numpy()
            own = dict(zip(self.calibration.names, state["weights"][c].tolist(), strict=False))
            self._set(category, own, state["sigma"][c])
