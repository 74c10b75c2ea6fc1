"""One reward, asked with patience: what it says is checked, tried again, remembered, and left alone when it is down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from loguru import logger
from torch import Tensor

from velatura.core.breaker import CircuitBreaker
from velatura.core.components import RewardModel
from velatura.core.score_cache import ScoreCache
from velatura.core.types import Sample, Scores, Status


@dataclass(slots=True)
class Asker:
    """Asks one reward about samples; whatever comes of it is one status for each, in their order."""

    label: str
    model: RewardModel  # type: ignore[type-arg]
    breaker: CircuitBreaker
    retries: int = 1
    cache: ScoreCache | None = None

    def scores(self, samples: Sequence[Sample], repeat: int = 0) -> Scores:
        """[B]; those that are known from before are not asked for again. `repeat` numbers passes over them."""
        if self.cache is None:
            return self.fresh(samples)
        keys = self.cache.keys(samples, self.model.scope, repeat)
        known = self.cache.find(keys)
        if self.model.scope == "group" and len(known) < len(samples):
            known = {}
        missing = [i for i in range(len(samples)) if i not in known]
        fresh = self.fresh([samples[i] for i in missing]) if missing else None
        if fresh is not None:
            self.cache.keep([keys[i] for i in missing], fresh)
        return _merged(len(samples), known, missing, fresh)

    def fresh(self, samples: Sequence[Sample]) -> Scores:
        """[B], asked now, unless the reward is left alone."""
        if self.breaker.is_half_open and len(samples) > 1 and self.model.scope == "sample":
            return joined([self.fresh(samples[:1]), self.fresh(samples[1:])])
        if self.breaker.is_open:
            return Scores.missing(len(samples), Status.FAILED, self.breaker.reason)
        scores = self._patiently(samples)
        self.breaker.note(scores.status, scores.reasons)
        return scores

    def _patiently(self, samples: Sequence[Sample]) -> Scores:
        """Score a batch; when that fails, again, and then one by one, so that one bad sample spoils no other."""
        reason = ""
        for attempt in range(1 + self.retries):
            scores = once(self.model, samples)
            if isinstance(scores, Scores):
                return self._again(samples, scores, self.retries - attempt)
            reason = scores
            logger.debug("reward '{}' failed (attempt {}): {}", self.label, attempt + 1, reason)
        if len(samples) == 1 or self.model.scope == "group":
            return Scores.missing(len(samples), Status.FAILED, reason)
        return self._one_by_one(samples)

    def _one_by_one(self, samples: Sequence[Sample]) -> Scores:
        """Each alone, until as many have failed in a row as the breaker takes."""
        parts: list[Scores] = []
        most = math.inf if self.breaker.settings is None else self.breaker.settings.after
        left, reason = most, ""
        for sample in samples:
            if left <= 0:
                parts.append(Scores.missing(1, Status.FAILED, reason))
                continue
            scores = once(self.model, [sample])
            part = Scores.missing(1, Status.FAILED, scores) if isinstance(scores, str) else scores
            parts.append(part)
            if part.status[0] is Status.FAILED:
                left, reason = left - 1, part.reasons[0]
            else:
                left = most
        return joined(parts)

    def _again(self, samples: Sequence[Sample], scores: Scores, retries: int) -> Scores:
        """The same scores, with those that failed (a refusal is an answer) asked for once more while retries last."""
        failed = [i for i, status in enumerate(scores.status) if status is Status.FAILED]
        if not failed or retries <= 0 or self.model.scope == "group":
            return scores
        second = once(self.model, [samples[i] for i in failed])
        if not isinstance(second, Scores):
            return scores
        values, status = scores.values.clone(), list(scores.status)
        reasons, notes = list(scores.reasons), list(scores.notes)
        for j, i in enumerate(failed):
            values[i], status[i] = second.values[j], second.status[j]
            reasons[i], notes[i] = second.reasons[j], second.notes[j]
        patched = Scores(values=values, status=tuple(status), reasons=tuple(reasons), notes=tuple(notes))
        return self._again(samples, patched, retries - 1)


def _merged(
    count: int, known: dict[int, tuple[float, str]], missing: Sequence[int], fresh: Scores | None
) -> Scores:  # fmt: skip
    """Scores from before and from now, in the order of their samples."""
    values, status = torch.zeros(count), [Status.OK] * count
    reasons, notes = [""] * count, [""] * count
    for i, (value, note) in known.items():
        values[i], notes[i] = value, note
    if fresh is not None:
        said, why = fresh.notes or ("",) * len(missing), fresh.reasons or ("",) * len(missing)
        for j, i in enumerate(missing):
            values[i], status[i], reasons[i], notes[i] = fresh.values[j], fresh.status[j], why[j], said[j]
    return Scores(values=values, status=tuple(status), reasons=tuple(reasons), notes=tuple(notes))


def once(model: RewardModel, samples: Sequence[Sample]) -> Scores | str:  # type: ignore[type-arg]
    """Scores, or the reason why there are none. The edge of a plugin: any exception ends here."""
    try:
        scores = model.score(samples)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return _contradiction(scores, len(samples)) or _without_nonsense(scores)


def _contradiction(scores: object, count: int) -> str:
    """Why an answer is not one score for each of `count` samples; empty when it is."""
    if not isinstance(scores, Scores):
        return f"`score` returned {type(scores).__name__} instead of Scores"
    if not isinstance(scores.values, Tensor):
        return f"`score` returned Scores whose values are a {type(scores.values).__name__} instead of a tensor"
    if tuple(scores.values.shape) != (count,) or len(scores.status) != count:
        shape = " x ".join(map(str, scores.values.shape)) or "1 (a scalar)"
        return f"`score` returned {shape} scores and {len(scores.status)} statuses for {count} samples"
    if len(scores.reasons) not in (0, count):
        return f"`score` returned {len(scores.reasons)} reasons for {count} samples"
    if len(scores.notes) not in (0, count):
        return f"`score` returned {len(scores.notes)} notes for {count} samples"
    unknown = [status for status in scores.status if status not in list(Status)]
    return f"`score` returned status {unknown[0]!r}, which is none of Status" if unknown else ""


def _without_nonsense(scores: Scores) -> Scores:
    """A NaN or infinite score is a failure; where none was given, the number beside the status is nothing."""
    values = scores.values.detach().float().cpu()
    finite = torch.isfinite(values)
    status = [Status(s) for s in scores.status]
    bad = [s is Status.OK and not ok for s, ok in zip(status, finite.tolist(), strict=True)]
    reasons = scores.reasons or ("",) * len(status)
    return Scores(
        values=torch.where(finite, values, 0.0),
        status=tuple(Status.FAILED if wrong else s for s, wrong in zip(status, bad, strict=True)),
        reasons=tuple(
            f"score is {value}" if wrong else reason
            for reason, wrong, value in zip(reasons, bad, values.tolist(), strict=True)
        ),
        notes=scores.notes or ("",) * len(status),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches as one."""
    return Scores(
        values=torch.cat([part.values for part in parts]),
        status=tuple(status for part in parts for status in part.status),
        reasons=tuple(reason for part in parts for reason in (part.reasons or ("",) * len(part.status))),
        notes=tuple(note for part in parts for note in (part.notes or ("",) * len(part.status))),
    )


def scopes(model: RewardModel, samples: Sequence[Sample], shown: Sequence[int]) -> list[list[int]]:  # type: ignore[type-arg]
    """Rows `shown`, cut into what goes into one call: all of them, or for a reward that compares its groups."""
    if not shown:
        return []
    if model.scope == "sample":
        return [list(shown)]
    groups: dict[int, list[int]] = {}
    for i in shown:
        groups.setdefault(samples[i].group, []).append(i)
    return list(groups.values())
