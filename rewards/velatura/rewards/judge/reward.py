"""The reward `vlm-judge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from loguru import logger

from velatura.api import Context, Prompt, RewardModel, Sample, Scores, Usage
from velatura.rewards.judge.backend import (
    Backend,
    dimension_of,
    grey_sample,
    identity_of,
    judge_fingerprint,
    opened,
    rubric_of,
)
from velatura.rewards.judge.fitted import settled
from velatura.rewards.judge.options import OPERATIONAL, VlmJudgeOptions
from velatura.rewards.judge.rubric import Rubric
from velatura.rewards.judge.scoring import as_scores

USUAL_MASS = 0.9
"""Judges that understood the form of the answer give the levels more probability than this."""


class VlmJudge(RewardModel[VlmJudgeOptions]):
    """A vision-language model marks a picture by a rubric; the score is its expected level (Qwen-Image-2.0-RL).

    r = sum_s s p(s) / sum_s p(s), s the levels of the rubric (1 to 5), p the model's probabilities at the place of the
    score after it has reasoned; range [lowest, highest level]. Reads (prompt, picture), or (sources, instruction,
    picture) for edits. arXiv:2606.27608 states pointwise rubrics and the expectation; the rubrics are ours.

    What gives no score is a status with its reason: no answer, a broken answer, another model's answer, a refusal, N/A,
    or levels with less probability than `min_mass` together.
    """

    name = "vlm-judge"
    cached = True
    operational = OPERATIONAL
    _backend: Backend
    _warned = False

    def setup(self, context: Context) -> None:
        """Read the rubric; load the model, or ask the server a first question."""
        self.options = settled(self.options, context)
        self.rubric = rubric_of(self.options, context)
        first = self.rubric.question(grey_sample(self.rubric), self.options.reasoning_tokens)
        self._backend = opened(self.options, self.rubric, context, first)

    def fingerprint(self, context: Context) -> str:
        """Changes with the rubric, the model's folder, and all options but the operational ones."""
        return judge_fingerprint(self, context)

    @cached_property
    def rubric(self) -> Rubric:
        """What the judge goes by; one of the user's own is read by `setup`."""
        return rubric_of(self.options)

    def applies(self, prompt: Prompt) -> bool:
        """Edits for rubrics of edits, other prompts for the others."""
        return self.rubric.applies(prompt)

    def needs_card(self) -> bool:
        """An opinion."""
        return True

    def dimension(self) -> str:
        """What the rubric judges."""
        return dimension_of(self.options)

    def identity(self) -> Mapping[str, str]:
        """A shipped rubric's content; that of a file is known by its name among the options."""
        return identity_of(self.options)

    def usage(self) -> Usage | None:
        """Tokens of all requests so far, or of all forwards."""
        return self._backend.usage

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [lowest, highest level], with what the judge wrote as notes."""
        tokens = self.options.reasoning_tokens
        verdicts = self._backend.verdicts([self.rubric.question(sample, tokens) for sample in samples])
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
