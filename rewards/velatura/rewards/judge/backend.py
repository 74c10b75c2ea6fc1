"""Where a judge's model runs: in this process, or behind a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from loguru import logger

from velatura.api import Context, Prompt, RewardModel, Sample, Usage, VelaturaError
from velatura.core.fingerprint import files_hash, lasting_options, named_contents
from velatura.core.recipe import content_hash
from velatura.rewards.judge.fitted import settled
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.rubric import Question, Rubric, is_file_name, load_rubric, shipped_rubric
from velatura.rewards.judge.scoring import Verdict


class Backend(Protocol):
    """Answers questions."""

    @property
    def usage(self) -> Usage | None:
        """Tokens read and written so far; None where a server does not say."""

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question, in their order."""
        ...


def rubric_of(options: VlmJudgeOptions, context: Context | None = None) -> Rubric:
    """The rubric that the options name; one of the user's own, or of a judge's folder, needs a context to be found.

    Raises:
        VelaturaError: it is missing or broken, or asked for before `setup` said where it lies.
    """
    if context is not None and is_file_name(options.rubric):
        return load_rubric(context.resolve(options.rubric))
    if dimension_of(options) == "custom":
        raise VelaturaError(
            f"the rubric of {options.path or options.rubric} is read by `setup`, which has not been called. Call "
            f"setup(context) first: the context says which folder paths are seen from."
        )
    return load_rubric(shipped_rubric(options.rubric))


def judge_fingerprint(judge: RewardModel[Any], context: Context) -> str:
    """Of the options that scores depend on, the model's folder, what the rubric says, shipped or one's own, and, of a
    server that was asked, whether scores are expectations or means of stated levels. Of a judge from a judge-fit stage
    the content counts, not the place; before and after `setup` it is the same.

    Raises:
        VelaturaError: there is no such rubric, or no such judge.
    """
    own = settled(judge.options, context)
    placed = ("path", "rubric", "model") if own.path is not None else ()
    given = lasting_options(own.model_dump(mode="json"), {*judge.operational, *placed})
    folder = [files_hash(Path(own.model))] if own.path is not None else []
    options = content_hash([judge.name, given, list(named_contents(given, context.base).values()), folder])
    kind = getattr(getattr(judge, "_backend", None), "has_logprobs", "")
    return f"{options}-{rubric_of(own, context).digest}-{kind}"


def dimension_of(options: VlmJudgeOptions) -> str:
    """The name of a shipped rubric; what a rubric of the user's own judges is not known."""
    return "custom" if options.path is not None or is_file_name(options.rubric) else options.rubric


def identity_of(options: VlmJudgeOptions) -> dict[str, str]:
    """The content of a shipped rubric; that of a file, or of a judge's folder, is told by the file."""
    known = options.path is not None or is_file_name(options.rubric)
    return {} if known else {"rubric content": rubric_of(options).digest}


def opened(options: VlmJudgeOptions, rubric: Rubric, context: Context, first: Question) -> Backend:
    """The model, loaded, or the server, asked a first question.

    Raises:
        VelaturaError: it does not open or does not answer.
    """
    logger.info("judge '{}', version {} ({})", rubric.name, rubric.version, rubric.digest)
    if options.server is None:
        from velatura.rewards.judge.local import LocalJudge

        return LocalJudge.opened(options, rubric, context)
    from velatura.rewards.judge.server import ServerJudge

    judge = ServerJudge(options, rubric)
    judge.check(first)
    return judge


def grey_sample(rubric: Rubric) -> Sample:
    """Something to ask a first question about."""
    grey = torch.linspace(0.25, 0.75, 64).expand(3, 64, 64)
    sources = (grey,) if rubric.task == "edit" else ()
    return Sample(prompt=Prompt(id="check", text="a grey gradient", task="t2i", sources=sources), image=grey, seed=0)
