"""Pictures to a report of scores and statuses. A reward that fails is a status, retried, counted, and budgeted."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

from velatura.core.asking import Asker, joined, scopes
from velatura.core.breaker import CircuitBreaker
from velatura.core.components import RewardModel
from velatura.core.errors import RewardError
from velatura.core.golden import GoldenSet
from velatura.core.pulse import alive
from velatura.core.ranks import Ranks
from velatura.core.reward_settings import Breaker
from velatura.core.score_cache import ScoreCache
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
    breaker: Breaker | None = None
    """When it is left alone; None asks it every time."""
    cache: ScoreCache | None = None
    """Where its scores are kept; None keeps none."""
    threads: int | None = None
    """CPU threads of torch while it scores; None leaves them as they are."""
    golden: GoldenSet | None = None
    """What its scores are checked on."""

    def weight_for(self, prompt: Prompt) -> float:
        """Weight for the prompt's category, of several their mean by share; 0 where the reward does not apply."""
        if not self.applies(prompt):
            return 0.0
        return sum(share * self.weight_by_category.get(c, self.weight) for c, share in prompt.membership.items())

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

    def __init__(
        self, rewards: Sequence[WeightedReward], *, max_failed: float, retries: int = 1, ranks: Ranks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """One thread per reward: rewards run beside each other, a reward never beside itself. `ranks`: the processes
        that judge together; the first of them checks golden sets for all. `clock`: seconds, for those checks."""
        self.rewards = tuple(rewards)
        self.ranks = ranks or Ranks()
        self.max_failed = max_failed
        self.retries = retries
        self._threads = [_thread(reward) for reward in self.rewards]
        self._askers = [
            Asker(
                label=r.label, model=r.model, retries=retries, cache=r.cache,
                breaker=CircuitBreaker(label=r.label, settings=r.breaker),
            )
            for r in self.rewards
        ]  # fmt: skip
        self._reports = 0
        self._clock, self._checked = clock, clock()
        self.health: dict[str, float] = {}
        """Share of each golden set's expectations that held at its latest check, by metric name."""
        self._pending: list[tuple[tuple[Sample, ...], list[Future[Scores]]]] = []
        self._recent: dict[str, deque[bool]] = {r.label: deque(maxlen=WINDOW) for r in self.rewards}
        self.failures: Counter[tuple[str, str]] = Counter()
        """(reward, status name) -> count, over the life of this judge."""

    def submit(self, samples: Sequence[Sample], repeat: int = 0) -> None:
        """Begin to score samples; groups must be whole. `repeat` numbers further passes over the same pictures, which
        are really made."""
        if not self.rewards:
            return
        own = tuple(samples)
        parts = zip(self._threads, self.rewards, self._askers, strict=True)
        scored = [thread.submit(self._score, reward, asker, own, repeat) for thread, reward, asker in parts]
        self._pending.append((own, scored))

    def reweigh(self, weights: Mapping[str, Mapping[str, float]]) -> None:
        """Label -> category -> weight, from the next samples on. Between a report and the samples after it, so that no
        report mixes two versions."""
        self.rewards = tuple(
            replace(r, weight=0.0, weight_by_category=weights[r.label]) if r.label in weights else r
            for r in self.rewards
        )

    def check_golden(self) -> None:
        """Score every reward's golden set now, in this process.

        Raises:
            RewardError: more are wrong than is allowed, or a score moved too far since the first check.
        """
        checks = [
            (reward, thread.submit(reward.golden.check, reward.at, asker))
            for reward, thread, asker in zip(self.rewards, self._threads, self._askers, strict=True)
            if reward.golden is not None
        ]
        shares = {f"reward/{reward.label}/golden": check.result() for reward, check in checks}
        self.health |= {name: share for name, share in shares.items() if share == share}
        self._checked = self._clock()

    def report(self, prompts: Sequence[Prompt]) -> RewardReport:
        """Scores of all samples submitted since the last report, in the order of submission.

        Raises:
            RewardError: a reward failed more often than `max_failed` allows, or its golden set no longer holds.
        """
        self._reports += 1
        pending, self._pending = self._pending, []
        samples = [sample for own, _ in pending for sample in own]
        columns = [joined([futures[r].result() for _, futures in pending]) for r in range(len(self.rewards))]
        for reward, scores in zip(self.rewards, columns, strict=True):
            self._count(reward, scores)
        passed = self._clock() - self._checked
        due = any(r.golden is not None and r.golden.is_due(self._reports, passed) for r in self.rewards)
        if due and self.ranks.first:
            self.check_golden()
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
        """The golden sets are checked before anything is scored: once, whatever the number of processes. Collective."""
        try:
            if any(reward.golden is not None for reward in self.rewards):
                self.ranks.from_first(self.check_golden)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(self, reward: WeightedReward, asker: Asker, samples: Sequence[Sample], repeat: int) -> Scores:
        """All samples through one reward; those it does not apply to are never shown to it."""
        shown = [i for i, sample in enumerate(samples) if reward.weight_for(sample.prompt) > 0 or
                 (reward.weight == 0 and reward.applies(sample.prompt))]  # fmt: skip
        values = torch.zeros(len(samples))
        status = [Status.NOT_APPLICABLE] * len(samples)
        reasons = ["does not apply to this prompt"] * len(samples)
        notes = [""] * len(samples)
        for part in scopes(reward.model, samples, shown):
            alive(f"judging by reward '{reward.label}'")
            scores = asker.scores([samples[i] for i in part], repeat)
            for j, i in enumerate(part):
                values[i] = scores.values[j]
                status[i] = scores.status[j]
                reasons[i] = scores.reasons[j] if scores.reasons else ""
                notes[i] = scores.notes[j] if scores.notes else ""
        return Scores(values=values, status=tuple(status), reasons=tuple(reasons), notes=tuple(notes))

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


def _thread(reward: WeightedReward) -> ThreadPoolExecutor:
    """A thread for a reward, and if it asks for them CPU threads that nobody else has.

    In torch the number of CPU threads belongs to the thread that sets it, and new threads begin with what was set
    last, by whomever: so the calling thread's number is fixed before and set again after.
    """
    name = f"judge-{reward.label}"
    if reward.threads is None:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    mine = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        max_workers=1, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(reward.threads,)
    )
    pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(mine)
    return pool
