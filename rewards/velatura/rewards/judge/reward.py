"""The reward `vlm-judge`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from loguru import logger

from velatura.api import Context, Prompt, RewardModel, Sample, Scores
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.rubric import Rubric, is_file_name, load_rubric, shipped_rubric
from velatura.rewards.judge.scoring import Verdict, as_scores

USUAL_MASS = 0.9
"""Judges that understood the form of the answer give the levels more probability than this."""


class Backend(Protocol):
    """Where the model runs."""

    def verdicts(self, samples: Sequence[Sample]) -> list[Verdict]:
        """One verdict per sample, in their order."""
        ...


class VlmJudge(RewardModel[VlmJudgeOptions]):
    """A vision-language model marks a picture by a rubric; the score is its expected level (Qwen-Image-2.0-RL).

    r = sum_s s p(s) / sum_s p(s), s the levels of the rubric (1 to 5), p the model's probabilities at the place of the
    score after it has reasoned; range [lowest, highest level]. Reads (prompt, picture), or (sources, instruction,
    picture) for edits. arXiv:2606.27608 states pointwise rubrics and the expectation; the rubrics are ours.

    What gives no score is a status with its reason: no answer, a broken answer, another model's answer, a refusal, N/A,
    or levels with less probability than `min_mass` together.
    """

    name = "vlm-judge"
    _backend: Backend
    _warned = False

    def setup(self, context: Context) -> None:
        """Read the rubric; load the model, or ask the server a first question."""
        rubric = self.options.rubric
        if is_file_name(rubric):
            self.rubric = load_rubric(context.resolve(rubric))
        logger.info("judge '{}', version {} ({})", self.rubric.name, self.rubric.version, self.rubric.digest)
        if self.options.server is None:
            from velatura.rewards.judge.local import LocalJudge

            self._backend = LocalJudge(self.options, self.rubric, context)
        else:
            from velatura.rewards.judge.server import ServerJudge

            judge = ServerJudge(self.options, self.rubric)
            judge.check()
            self._backend = judge

    @cached_property
    def rubric(self) -> Rubric:
        """What the judge goes by; one of the user's own is read by `setup`."""
        return load_rubric(shipped_rubric(self.options.rubric))

    def applies(self, prompt: Prompt) -> bool:
        """Edits for rubrics of edits, other prompts for the others."""
        return self.rubric.applies(prompt)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [lowest, highest level], with what the judge wrote as notes."""
        verdicts = self._backend.verdicts(samples)
        masses = [v.mass for v in verdicts if v.mass is not None]
        if masses:
            self._look_at_mass(masses)
        return as_scores(verdicts)

    def _look_at_mass(self, masses: Sequence[float]) -> None:
        """Say once that scores are valid but odd."""
        mean = sum(masses) / len(masses)
        logger.debug("judge '{}': mean probability of the levels {:.4f}", self.rubric.name, mean)
        if mean < USUAL_MASS and not self._warned:
            self._warned = True
            logger.warning(
                "judge '{}': at the place of the score the levels have probability {:.2f} on average; a judge that "
                "knows the form gives them more than {:g}. Look at its notes, or raise `reasoning_tokens`.",
                self.rubric.name, mean, USUAL_MASS,
            )  # fmt: skip
