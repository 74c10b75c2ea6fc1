"""Checks of rewards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from velatura.core.asking import once, scopes
from velatura.core.components import RewardModel
from velatura.core.types import Sample, Scores, Status
from velatura.testing.kit import NotChecked, Subject, check, require, require_close, untouched


def _tried(subject: Subject) -> tuple[RewardModel[Any], list[Sample]]:
    """The reward, and pictures for the prompts on which it has something to say; none of them was shown to it."""
    reward: RewardModel[Any] = subject.ready()
    samples = [sample for sample in subject.pictures() if reward.applies(sample.prompt)]
    if not samples:
        raise NotChecked("it applies to no prompt tried; name some that it judges: `prompts=[...]`")
    return reward, samples


def _judged(reward: RewardModel[Any], samples: Sequence[Sample]) -> Scores:
    """As `scored`; there is nothing to check where none counts."""
    scores = scored(reward, samples)
    if all(status is not Status.OK for status in scores.status):
        raise NotChecked(
            "it judges no picture tried; name prompts that it judges, `prompts=[...]`, or give pictures: "
            "`check(Trial(samples=[...]))`"
        )
    return scores


def scored(reward: RewardModel[Any], samples: Sequence[Sample]) -> Scores:
    """Its scores in the order of the samples, asked as a run asks: a reward of scope `group` one group at a time."""
    values, status = torch.zeros(len(samples)), [Status.FAILED] * len(samples)
    for rows in scopes(reward, samples, range(len(samples))):
        part = _asked(reward, [samples[i] for i in rows])
        for j, i in enumerate(rows):
            values[i], status[i] = part.values[j].detach().float(), Status(part.status[j])
    return Scores(values=values, status=tuple(status))


def _asked(reward: RewardModel[Any], samples: Sequence[Sample]) -> Scores:
    answer = reward.score(samples)
    require(isinstance(answer, Scores), f"`score` returned a {type(answer).__name__} instead of Scores")
    shape = list(answer.values.shape)
    require(
        shape == [len(samples)] and len(answer.status) == len(samples),
        f"`score` returned values {shape} and {len(answer.status)} statuses for {len(samples)} samples",
    )
    return answer


@check("reward")
def one_score_per_sample(subject: Subject) -> None:
    """Values and statuses in the order of the samples, a single one included."""
    reward, samples = _tried(subject)
    if reward.scope == "sample":
        _asked(reward, samples[:1])
    _judged(reward, samples)


@check("reward")
def scores_that_count_are_finite(subject: Subject) -> None:
    """What could not be scored has a status, not a NaN."""
    scores = _judged(*_tried(subject))
    wrong = [float(v) for v, s in zip(scores.values, scores.status, strict=True) if s is Status.OK and not v.isfinite()]
    require(not wrong, f"status OK beside {wrong[:3]}; give what cannot be scored Status.FAILED")


@check("reward")
def score_does_not_depend_on_the_batch(subject: Subject) -> None:
    """Alone or among others, a picture (of scope `group`: a group) has one score."""
    reward, samples = _tried(subject)
    together = _judged(reward, samples)
    units = (
        [[i] for i in range(len(samples))] if reward.scope == "sample" else scopes(reward, samples, range(len(samples)))
    )
    for rows in units:
        alone = scored(reward, [samples[i] for i in rows])
        require(
            alone.status == tuple(together.status[i] for i in rows),
            f"sample {rows[0]} has another status alone than among {len(samples)}",
        )
        require_close(
            alone.values, together.values[rows], f"sample {rows[0]} has another score alone than among others"
        )


@check("reward")
def score_does_not_depend_on_the_order(subject: Subject) -> None:
    """The samples in another order have the same scores."""
    reward, samples = _tried(subject)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1)).tolist()
    there, again = _judged(reward, samples), scored(reward, [samples[i] for i in order])
    require(again.status == tuple(there.status[i] for i in order), "statuses change with the order of the samples")
    require_close(again.values, there.values[order], "scores change with the order of the samples")


@check("reward")
def scoring_leaves_its_input_alone(subject: Subject) -> None:
    """Other rewards see the same pictures and prompts."""
    reward, samples = _tried(subject)
    before = [copy.deepcopy(dict(sample.prompt.metadata)) for sample in samples]
    images = [sample.image for sample in samples]
    with untouched("`score`", *images, *(source for sample in samples for source in sample.prompt.sources)):
        _judged(reward, samples)
    same = all(repr(a) == repr(sample.prompt.metadata) for a, sample in zip(before, samples, strict=True))
    require(same, "`score` changes the metadata of prompts")


@check("reward")
def a_picture_that_is_no_picture_gets_no_score(subject: Subject) -> None:
    """NaN pixels end in a status, an exception or a NaN, each of which a run masks; never in a number."""
    reward, samples = _tried(subject)
    _judged(reward, samples)
    if reward.scope == "group":
        samples = [sample for sample in samples if sample.group == samples[0].group]
    broken = [
        Sample(prompt=s.prompt, image=torch.full_like(s.image, torch.nan), seed=s.seed, group=s.group) for s in samples
    ]
    scores = once(reward, broken)
    if isinstance(scores, str):
        return
    numbers = [float(v) for v, s in zip(scores.values, scores.status, strict=True) if s is Status.OK]
    require(not numbers, f"pictures of NaN were scored {numbers[:1]}; give them Status.FAILED")
