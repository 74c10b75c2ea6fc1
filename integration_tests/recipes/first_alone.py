"""A prompt filter that leaves one prompt of a step, so that all but one process have nothing to learn from."""

from __future__ import annotations

import torch

from velatura.api import Admission, NoOptions, PromptFilter, RewardReport, hookimpl


class FirstAlone(PromptFilter[NoOptions]):
    """Keeps the first prompt and drops the others."""

    name = "first-alone"

    def admit(self, report: RewardReport) -> Admission:
        """[P] decisions."""
        number = torch.arange(len(report.prompts))
        return Admission(keep=number == 0, reason=("first", *["not the first"] * (len(number) - 1)), statistic=number)


@hookimpl
def velatura_prompt_filter() -> list[type[FirstAlone]]:
    """What this file offers."""
    return [FirstAlone]
