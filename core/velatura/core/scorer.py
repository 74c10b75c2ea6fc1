"""One reward, one thread: requests that wait are scored together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from velatura.core.errors import VelaturaError
from velatura.core.judge import Judge, WeightedReward
from velatura.core.served import Served
from velatura.core.types import Prompt, Sample, Scores, Status


@dataclass(frozen=True, slots=True)
class _Job:
    samples: tuple[Sample, ...]
    scores: Future[Scores] = field(default_factory=Future)


class Scorer:
    """Scores pictures with one reward. Whatever it raises is a status of the pictures it was shown."""

    def __init__(self, served: Served, batch: int) -> None:
        """The thread begins at once; pictures go to the model `batch` at a time."""
        self.served, self.batch = served, batch
        reward = WeightedReward(label=served.label, at=served.label, model=served.model)
        self._judge = Judge([reward], max_failed=1.0, retries=0)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"scorer-{served.label}", daemon=True)
        self._thread.start()

    def submit(self, samples: Sequence[Sample]) -> Future[Scores]:
        """Scores of these pictures, when it is their turn."""
        job = _Job(tuple(samples))
        self._jobs.put(job)
        return job.scores

    def close(self) -> None:
        """End after what waits now."""
        self._jobs.put(None)
        self._thread.join()
        self._judge.close()

    def _work(self) -> None:
        ending = False
        while not ending:
            jobs, ending = self._waiting()
            scores = self._merged([sample for job in jobs for sample in job.samples])
            stops = list(accumulate(len(job.samples) for job in jobs))
            for job, stop in zip(jobs, stops, strict=True):
                job.scores.set_result(_part(scores, stop - len(job.samples), stop))

    def _waiting(self) -> tuple[list[_Job], bool]:
        """The next request, with those behind it that go into one batch; and whether it is over."""
        jobs: list[_Job] = []
        try:
            while not jobs or sum(len(job.samples) for job in jobs) < self.batch:
                job = self._jobs.get(block=not jobs)
                if job is None:
                    return jobs, True
                jobs.append(job)
        except queue.Empty:
            return jobs, False
        return jobs, False

    def _merged(self, samples: Sequence[Sample]) -> Scores:
        """Scores of all requests; a prompt that the reward makes nothing of fails its own pictures alone."""
        complaints = {id(sample.prompt): self._complaint(sample.prompt) for sample in samples}
        said = [complaints[id(sample.prompt)] for sample in samples]
        whole = [i for i, complaint in enumerate(said) if not complaint]
        values, status = torch.zeros(len(samples)), [Status.FAILED] * len(samples)
        reasons, notes = list(said), [""] * len(samples)
        if whole:
            scores = self._scored([samples[i] for i in whole])
            for j, i in enumerate(whole):
                values[i], status[i] = scores.values[j], scores.status[j]
                reasons[i], notes[i] = scores.reasons[j], (scores.notes or ("",) * len(whole))[j]
        return Scores(values=values, status=tuple(status), reasons=tuple(reasons), notes=tuple(notes))

    def _complaint(self, prompt: Prompt) -> str:
        """Why nothing can be said for a prompt, from the reward's own words; empty where something can."""
        try:
            if self.served.model.applies(prompt):
                _ = prompt.membership
        except VelaturaError as error:
            return str(error)
        except Exception as error:  # `applies` of a plugin
            return f"{type(error).__name__}: {error}"
        return ""

    def _scored(self, samples: Sequence[Sample]) -> Scores:
        for start in range(0, len(samples), self.batch):
            self._judge.submit(samples[start : start + self.batch])
        try:
            report = self._judge.report([sample.prompt for sample in samples])
        except Exception as error:  # `applies` of a plugin
            return Scores.missing(len(samples), Status.FAILED, f"{type(error).__name__}: {error}")
        return Scores(
            values=report.scores[:, 0],
            status=tuple(Status(int(status)) for status in report.status[:, 0]),
            reasons=report.reasons[0],
            notes=report.notes[0],
        )


def _part(scores: Scores, start: int, stop: int) -> Scores:
    return Scores(
        values=scores.values[start:stop],
        status=scores.status[start:stop],
        reasons=scores.reasons[start:stop],
        notes=scores.notes[start:stop],
    )
