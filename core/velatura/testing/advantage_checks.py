"""Checks of advantage estimators and prompt filters."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from velatura.core.types import Admission, Advantages, RewardReport, Status, group_rows
from velatura.testing.kit import Subject, check, require, require_close, require_finite, untouched
from velatura.testing.samples import make_report

PER_PROMPT = 4
GONE = (3, 8, 9, 10, 11)
"""Rows without scores: one of the first prompt's, all of the third's."""


def _tensors(report: RewardReport) -> tuple[Tensor, ...]:
    return (report.scores, report.status, report.weight, report.group)


def _estimated(subject: Subject, report: RewardReport) -> Advantages:
    """By a new estimator: some remember earlier reports."""
    advantages: Advantages = subject.ready().estimate(report)
    return advantages


def _holey() -> RewardReport:
    return make_report(per_prompt=PER_PROMPT, missing=dict.fromkeys(GONE, Status.FAILED))


@check("advantage")
def one_finite_advantage_per_sample(subject: Subject) -> None:
    """[B], and [B] whether it counts."""
    report = make_report(per_prompt=PER_PROMPT)
    with untouched("`estimate`", *_tensors(report)):
        advantages = _estimated(subject, report)
    count = len(report.scores)
    shapes = [list(advantages.values.shape), list(advantages.valid.shape)]
    require(shapes == [[count], [count]], f"values and valid have shapes {shapes} for {count} samples")
    require_finite(advantages.values, "an advantage")
    require(bool(advantages.values.any()), "groups whose scores differ have no advantages other than 0")


@check("advantage")
def advantages_of_a_group_sum_to_zero(subject: Subject) -> None:
    """They say who is better within a prompt, not which prompts are easy."""
    report = make_report(per_prompt=PER_PROMPT)
    values = _estimated(subject, report).values
    for rows in group_rows(report.group, len(report.prompts)):
        require_close(values[rows].sum(), torch.tensor(0.0), "the advantages of a group do not sum to 0")


@check("advantage")
def a_constant_group_has_no_advantages(subject: Subject) -> None:
    """Samples that are equally good move nothing."""
    report = make_report(per_prompt=PER_PROMPT)
    report.scores[:PER_PROMPT] = 0.7
    values = _estimated(subject, report).values[:PER_PROMPT]
    require_close(values, torch.zeros(PER_PROMPT), "a group of equal scores has advantages other than 0", 1e-3)


@check("advantage")
def a_missing_score_is_no_advantage(subject: Subject) -> None:
    """0 and not valid where nothing was scored, whatever number stands there."""
    report = _holey()
    report.scores[list(GONE)] = 1e6
    advantages = _estimated(subject, report)
    require_finite(advantages.values, "an advantage beside missing scores")
    require(not bool(advantages.values[list(GONE)].any()), "samples without a score have advantages other than 0")
    require(not bool(advantages.valid[list(GONE)].any()), "samples without a score count as valid")
    kept = _estimated(subject, _holey())
    require_close(advantages.values, kept.values, "the number beside a missing score changes advantages")


@check("advantage")
def groups_do_not_depend_on_the_order(subject: Subject) -> None:
    """Samples find their group by its id, in any order, and not by its text."""
    report = make_report(per_prompt=PER_PROMPT)
    order = torch.randperm(len(report.scores), generator=torch.Generator().manual_seed(3))
    shuffled = replace(
        report, scores=report.scores[order], status=report.status[order], weight=report.weight[order],
        group=report.group[order],
    )  # fmt: skip
    there, again = _estimated(subject, report), _estimated(subject, shuffled)
    require_close(again.values, there.values[order], "advantages change with the order of the samples")


@check("advantage")
def what_it_remembers_survives_a_checkpoint(subject: Subject) -> None:
    """`state_dict`, loaded into a new one, goes on bit for bit."""
    reports = [make_report(scale * torch.rand(24, 2, generator=torch.Generator().manual_seed(9))) for scale in (1, 3)]
    first, second = subject.ready(), subject.ready()
    first.estimate(reports[0])
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second.load_state_dict(state)
    went_on, resumed = first.estimate(reports[1]), second.estimate(reports[1])
    require_close(
        resumed.values, went_on.values, "after a checkpoint it estimates otherwise: complete `state_dict`", 0.0
    )


def _admitted(subject: Subject, report: RewardReport) -> Admission:
    admission: Admission = subject.ready().admit(report)
    return admission


@check("prompt_filter")
def one_decision_with_a_reason_per_prompt(subject: Subject) -> None:
    """`keep` [P] bool, a reason and a statistic for each, and the report left as it is."""
    report = make_report(per_prompt=PER_PROMPT)
    with untouched("`admit`", *_tensors(report)):
        admission = _admitted(subject, report)
    count = len(report.prompts)
    require(admission.keep.dtype == torch.bool, f"`keep` is {admission.keep.dtype} instead of bool")
    lengths = [len(admission.keep), len(admission.reason), len(admission.statistic)]
    require(lengths == [count] * 3, f"{lengths} decisions, reasons and statistics for {count} prompts")
    require(all(reason.strip() for reason in admission.reason), "a decision has no reason")
    require(len(admission.state) in (0, count), f"{len(admission.state)} states for {count} prompts")


@check("prompt_filter")
def a_prompt_without_scores_is_not_kept(subject: Subject) -> None:
    """Nothing is known of it; a failure is no reason to train on it."""
    missing = dict.fromkeys(range(PER_PROMPT), Status.FAILED)
    admission = _admitted(subject, make_report(per_prompt=PER_PROMPT, missing=missing))
    require(not bool(admission.keep[0]), "a prompt whose samples have no scores is kept")


@check("prompt_filter")
def decisions_do_not_depend_on_the_order(subject: Subject) -> None:
    """Prompts in another order are decided alike."""
    report = make_report(per_prompt=PER_PROMPT)
    count = len(report.prompts)
    turned = replace(report, group=count - 1 - report.group, prompts=report.prompts[::-1])
    there, again = _admitted(subject, report), _admitted(subject, turned)
    require(torch.equal(again.keep.flip(0), there.keep), "other prompts are kept when prompts come in another order")
