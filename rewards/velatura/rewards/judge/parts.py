"""The reward `vlm-parts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from velatura.api import Context, Options, Prompt, RewardModel, Sample, Scores, Status, Usage
from velatura.core.explain import complaints
from velatura.core.fingerprint import options_fingerprint
from velatura.rewards.composition import geometric, soft_minimum
from velatura.rewards.judge.options import OPERATIONAL, VlmJudgeOptions
from velatura.rewards.judge.reward import VlmJudge


class PartOptions(Options):
    """One rubric."""

    rubric: str = Field(description="As in `vlm-judge`.")
    weight: float = Field(1.0, gt=0, description="How much it counts among the parts.")


class VlmPartsOptions(Options):
    """Options of `vlm-parts`."""

    parts: list[PartOptions] = Field(
        min_length=2, description="Rubrics with their weights, like {rubric: alignment, weight: 2.0}."
    )
    combine: Literal["geometric", "soft-minimum", "mean"] = Field(
        "geometric",
        description="How the scores of the parts become one; the first two let no part make up for another.",
    )
    beta: float = Field(4.0, gt=0, description="Of `soft-minimum`: larger is nearer to the minimum.")
    floor: float = Field(0.01, gt=0, lt=1, description="Of `geometric`: lower scores count as this.")
    judge: dict[str, Any] = Field(description="Options of `vlm-judge` without `rubric`, for all parts.")

    @model_validator(mode="after")
    def _is_a_judge(self) -> Self:
        if "rubric" in self.judge:
            raise ValueError("judge: rubric belongs to the parts")
        for part in self.parts:
            try:
                self.of(part)
            except ValidationError as error:
                place, said = next(complaints(error, VlmJudgeOptions, "option"))
                raise ValueError(f"{'.'.join(['judge', *map(str, place)])}: {said}") from error
        return self

    def of(self, part: PartOptions) -> VlmJudgeOptions:
        """What the judge of a part is told."""
        return VlmJudgeOptions.model_validate({**self.judge, "rubric": part.rubric})


class VlmParts(RewardModel[VlmPartsOptions]):
    """Several rubrics of one judge as one score in [0, 1]; a weak part is not made up for by a strong one.

    x_k = (r_k - lowest) / (highest - lowest) of the score r_k by rubric k, w_k its weight over those that apply;
    geometric: exp(sum_k w_k log max(x_k, floor)), soft-minimum: -(1 / beta) log sum_k w_k exp(-beta x_k),
    mean: sum_k w_k x_k. A part whose rubric is for other prompts is left out. A picture that one of the
    others gives no score has none, also where it says N/A: otherwise a picture could get rid of its weakest part.
    """

    name = "vlm-parts"
    cached = True
    operational = frozenset(f"judge.{name}" for name in OPERATIONAL)

    @cached_property
    def _judges(self) -> list[VlmJudge]:
        return [VlmJudge(self.options.of(part)) for part in self.options.parts]

    def setup(self, context: Context) -> None:
        """Set up the judge of each part; a model in this process is loaded once for all."""
        for judge in self._judges:
            judge.setup(context)

    def needs_card(self) -> bool:
        """An opinion."""
        return True

    def dimension(self) -> str:
        """What its rubrics judge together."""
        return "custom"

    def identity(self) -> Mapping[str, str]:
        """The content of shipped rubrics."""
        own = [(number, judge.identity()) for number, judge in enumerate(self._judges, start=1)]
        return {f"part {number}, {name}": value for number, found in own for name, value in found.items()}

    def fingerprint(self, context: Context) -> str:
        """Changes with what its parts depend on."""
        return "-".join(
            [options_fingerprint(self, context, ("judge",)), *(judge.fingerprint(context) for judge in self._judges)]
        )

    def usage(self) -> Usage | None:
        """Tokens of all parts; None where no server says."""
        used = [own for judge in self._judges if (own := judge.usage()) is not None]
        return sum(used, Usage()) if used else None

    def applies(self, prompt: Prompt) -> bool:
        """Where one of the parts does."""
        return any(judge.applies(prompt) for judge in self._judges)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1], with the score of each part as a note."""
        columns = [self._part(judge, samples) for judge in self._judges]
        status = torch.tensor([[int(s) for s in column.status] for column in columns]).T
        values = torch.stack([column.values.double() for column in columns], 1)
        valid = status == int(Status.OK)
        weight = torch.tensor([part.weight for part in self.options.parts], dtype=torch.float64) * valid
        share = weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
        combined = self._combined(values.where(valid, 1.0), share)
        outcome = [self._outcome(columns, i, sample.prompt) for i, sample in enumerate(samples)]
        return Scores(
            values=combined.where(torch.tensor([found is Status.OK for found, _ in outcome]), 0.0).float(),
            status=tuple(found for found, _ in outcome),
            reasons=tuple(why for _, why in outcome),
            notes=tuple(self._note(columns, i) for i in range(len(samples))),
        )

    def _part(self, judge: VlmJudge, samples: Sequence[Sample]) -> Scores:
        """Scores of one part on [0, 1]; pictures that its rubric is not for are not shown to it."""
        shown = [i for i, sample in enumerate(samples) if judge.applies(sample.prompt)]
        made = judge.score([samples[i] for i in shown]) if shown else Scores.of(torch.zeros(0))
        lowest, highest = min(judge.rubric.levels), max(judge.rubric.levels)
        values, status = torch.zeros(len(samples)), [Status.NOT_APPLICABLE] * len(samples)
        reasons, notes = ["the rubric is for other prompts"] * len(samples), [""] * len(samples)
        for j, i in enumerate(shown):
            values[i], status[i] = (made.values[j] - lowest) / (highest - lowest), made.status[j]
            reasons[i], notes[i] = made.reasons[j], made.notes[j]
        return Scores(values=values, status=tuple(status), reasons=tuple(reasons), notes=tuple(notes))

    def _combined(self, values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """[B] of [B K] scores and shares."""
        if self.options.combine == "geometric":
            return geometric(values, share, self.options.floor)
        if self.options.combine == "soft-minimum":
            return soft_minimum(values, share, self.options.beta)
        return (share * values).sum(1)

    def _outcome(self, columns: Sequence[Scores], i: int, prompt: Prompt) -> tuple[Status, str]:
        """The worst of the parts whose rubric is for the prompt, and why; OK where all of them are."""
        asked = [k for k, judge in enumerate(self._judges) if judge.applies(prompt)]
        for bad in (Status.FAILED, Status.REFUSED, Status.NOT_APPLICABLE):
            for k in asked:
                if columns[k].status[i] is bad:
                    return bad, f"{self.options.parts[k].rubric}: {columns[k].reasons[i]}"
        return (Status.OK, "") if asked else (Status.NOT_APPLICABLE, "the rubrics are for other prompts")

    def _note(self, columns: Sequence[Scores], i: int) -> str:
        return "\n---\n".join(
            f"{part.rubric}: {column.notes[i]}"
            for part, column in zip(self.options.parts, columns, strict=True)
            if column.notes[i]
        )
