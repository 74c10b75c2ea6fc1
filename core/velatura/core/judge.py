"""Pictures to a report of scores and statuses. A reward that fails is a status, retried, counted, and budgeted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor

from velatura.core.components import RewardModel
from velatura.core.errors import RewardError
from velatura.core.types import Prompt, RewardReport, Sample, Scores, Status

WINDOW = 200
"""The failure rate is measured over the latest scores: so many, or all of a report when it has more."""
ENOUGH = 10
"""Fewer scores say nothing about a rate, unless all of them failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedReward:
    """A reward model with its place in the composite."""

    label: str
    """How reports name it."""
    at: str
    """Where the recipe names it, for messages."""
    model: RewardModel  # type: ignore[type-arg]
    weight: float = 1.0
    weight_by_category: Mapping[str, float] = field(default_factory=dict)

    def weight_for(self, prompt: Prompt) -> float:
        """Weight for the prompt's category; 0 where the reward does not apply."""
        return self.weight_by_category.get(prompt.category, self.weight) if self.applies(prompt) else 0.0

    def applies(self, prompt: Prompt) -> bool:
        """What the reward says of the prompt.

        Raises:
            RewardError: it raised; that is no matter of one picture, so there is no retry and no budget.
        """
        try:
            return self.model.applies(prompt)
        except Exception as error:
            raise RewardError(
                f"{self.at}: `applies` of reward '{self.label}' raised {type(error).__name__}: {error} (prompt "
                f"{prompt.id!r}). Mend it: it decides from the prompt alone."
            ) from error


class Judge:
    """Scores samples in a pool of threads while the next ones are made.

    `submit` returns at once; `report` waits for everything submitted since the last report.
    """

    def __init__(self, rewards: Sequence[WeightedReward], *, max_failed: float, retries: int = 1) -> None:
        """One thread per reward: rewards run beside each other, a reward never beside itself."""
        self.rewards = tuple(rewards)
        self.max_failed = max_failed
        self.retries = retries
        self._threads = [ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"judge-{r.label}") for r in self.rewards]
        self._pending: list[tuple[tuple[Sample, ...], list[Future[Scores]]]] = []
        self._recent: dict[str, deque[bool]] = {r.label: deque(maxlen=WINDOW) for r in self.rewards}
        self.failures: Counter[tuple[str, str]] = Counter()
        """(reward, status name) -> count, over the life of this judge."""

    def submit(self, samples: Sequence[Sample]) -> None:
        """Begin to score samples; groups must be whole."""
        if not self.rewards:
            return
        own = tuple(samples)
        scored = [t.submit(self._score, reward, own) for t, reward in zip(self._threads, self.rewards, strict=True)]
        self._pending.append((own, scored))

    def report(self, prompts: Sequence[Prompt]) -> RewardReport:
        """Scores of all samples submitted since the last report, in the order of submission.

        Raises:
            RewardError: a reward failed more often than `max_failed` allows.
        """
        pending, self._pending = self._pending, []
        samples = [sample for own, _ in pending for sample in own]
        columns = [_joined([futures[r].result() for _, futures in pending]) for r in range(len(self.rewards))]
        for reward, scores in zip(self.rewards, columns, strict=True):
            self._count(reward, scores)
        return RewardReport(
            names=tuple(r.label for r in self.rewards),
            scores=torch.stack([c.values for c in columns], dim=1),
            status=torch.tensor([[int(s) for s in c.status] for c in columns]).T.contiguous(),
            weight=torch.tensor([[r.weight_for(s.prompt) for r in self.rewards] for s in samples]),
            group=torch.tensor([s.group for s in samples]),
            prompts=tuple(prompts),
            reasons=tuple(c.reasons for c in columns),
            notes=tuple(c.notes for c in columns),
        )

    def close(self) -> None:
        """Stop the threads; what has not begun is not begun."""
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(self, reward: WeightedReward, samples: Sequence[Sample]) -> Scores:
        """All samples through one reward; those it does not apply to are never shown to it."""
        shown = [i for i, sample in enumerate(samples) if reward.weight_for(sample.prompt) > 0 or
                 (reward.weight == 0 and reward.applies(sample.prompt))]  # fmt: skip
        values = torch.zeros(len(samples))
        status = [Status.NOT_APPLICABLE] * len(samples)
        reasons = ["does not apply to this prompt"] * len(samples)
        notes = [""] * len(samples)
        for part in _scopes(reward.model, samples, shown):
            scores = self._patiently(reward, [samples[i] for i in part])
            for j, i in enumerate(part):
                values[i] = scores.values[j]
                status[i] = scores.status[j]
                reasons[i] = scores.reasons[j] if scores.reasons else ""
                notes[i] = scores.notes[j] if scores.notes else ""
        return Scores(values=values, status=tuple(status), reasons=tuple(reasons), notes=tuple(notes))

    def _patiently(self, reward: WeightedReward, samples: Sequence[Sample]) -> Scores:
        """Score a batch; when that fails, again, and then one by one, so that one bad sample spoils no other."""
        reason = ""
        for attempt in range(1 + self.retries):
            scores = _once(reward.model, samples)
            if isinstance(scores, Scores):
                return self._again(reward, samples, scores, self.retries - attempt)
            reason = scores
            logger.debug("reward '{}' failed (attempt {}): {}", reward.label, attempt + 1, reason)
        if len(samples) == 1 or reward.model.scope == "group":
            return Scores.missing(len(samples), Status.FAILED, reason)
        return _joined([_once_or_failed(reward.model, [sample]) for sample in samples])

    def _again(self, reward: WeightedReward, samples: Sequence[Sample], scores: Scores, retries: int) -> Scores:
        """The same scores, with those that failed (a refusal is an answer) asked for once more while retries last."""
        failed = [i for i, status in enumerate(scores.status) if status is Status.FAILED]
        if not failed or retries <= 0 or reward.model.scope == "group":
            return scores
        second = _once(reward.model, [samples[i] for i in failed])
        if not isinstance(second, Scores):
            return scores
        values, status = scores.values.clone(), list(scores.status)
        reasons, notes = list(scores.reasons), list(scores.notes)
        for j, i in enumerate(failed):
            values[i], status[i] = second.values[j], second.status[j]
            reasons[i], notes[i] = second.reasons[j], second.notes[j]
        patched = Scores(values=values, status=tuple(status), reasons=tuple(reasons), notes=tuple(notes))
        return self._again(reward, samples, patched, retries - 1)

    def _count(self, reward: WeightedReward, scores: Scores) -> None:
        recent = deque(self._recent[reward.label], maxlen=max(WINDOW, len(scores.status)))
        self._recent[reward.label] = recent
        reason = ""
        for i, status in enumerate(scores.status):
            if status is Status.NOT_APPLICABLE:
                continue
            recent.append(status is not Status.OK)
            if status is not Status.OK:
                self.failures[reward.label, status.name.lower()] += 1
                reason = scores.reasons[i] if scores.reasons else "no reason given"
        rate = sum(recent) / max(1, len(recent))
        enough = len(recent) >= ENOUGH or rate == 1
        if rate > self.max_failed and enough:
            raise RewardError(
                f"{reward.at}: reward '{reward.label}' gave no score for {sum(recent)} of its last {len(recent)} "
                f"samples ({rate:.0%}); the budget `max_failed` is {self.max_failed:.0%}. Last reason: {reason}. "
                f"Mend the reward and start again: finished stages and checkpoints are kept."
            )


def _scopes(model: RewardModel, samples: Sequence[Sample], shown: Sequence[int]) -> list[list[int]]:  # type: ignore[type-arg]
    if not shown:
        return []
    if model.scope == "sample":
        return [list(shown)]
    groups: dict[int, list[int]] = {}
    for i in shown:
        groups.setdefault(samples[i].group, []).append(i)
    return list(groups.values())


def _once(model: RewardModel, samples: Sequence[Sample]) -> Scores | str:  # type: ignore[type-arg]
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


def _once_or_failed(model: RewardModel, samples: Sequence[Sample]) -> Scores:  # type: ignore[type-arg]
    scores = _once(model, samples)
    return Scores.missing(len(samples), Status.FAILED, scores) if isinstance(scores, str) else scores


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


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(
        values=torch.cat([part.values for part in parts]),
        status=tuple(status for part in parts for status in part.status),
        reasons=tuple(reason for part in parts for reason in (part.reasons or ("",) * len(part.status))),
        notes=tuple(note for part in parts for note in (part.notes or ("",) * len(part.status))),
    )
