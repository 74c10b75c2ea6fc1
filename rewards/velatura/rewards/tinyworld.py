"""Rewards of the embedded world. All but sharpness read one shared verdict, so a picture is verified once for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import NoOptions, Options, Prompt, RewardModel, Sample, Scores, Status
from velatura.plugins.tinyworld.scenes import Request, request_of
from velatura.plugins.tinyworld.verify import JUDGE, Verdict, flaw


class AlignmentOptions(Options):
    """How hard the judge is."""

    strict: bool = Field(False, description="1 if everything is right and else 0, instead of partial credit.")


class Alignment(RewardModel[AlignmentOptions]):
    """Share of what a text-to-image prompt asks for that is there, in [0, 1].

    Colours, shapes, count, background, relation, style; of a portrait a well-formed face, its expression and the
    background, but not whose face it is: like the judges of large models, this one knows nobody by name.
    """

    name = "tinyworld-alignment"

    def applies(self, prompt: Prompt) -> bool:
        """Text-to-image prompts of the world."""
        return _is_t2i(request_of(prompt))

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]."""
        return _scores(samples, self.applies, self._credit)

    def _credit(self, verdict: Verdict) -> float | None:
        if not self.options.strict:
            return verdict.nameless
        return float(verdict.nameless_strict)


class Aesthetics(RewardModel[NoOptions]):
    """Cleanliness: share of pixels that are close to a colour of the world, in [0, 1]."""

    name = "tinyworld-aesthetics"

    def applies(self, prompt: Prompt) -> bool:
        """All prompts of the world."""
        return request_of(prompt) is not None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]."""
        return _scores(samples, self.applies, lambda verdict: verdict.clean)


class Portrait(RewardModel[NoOptions]):
    """How well-formed the face of a portrait is, in [0, 1], whoever it is."""

    name = "tinyworld-portrait"

    def applies(self, prompt: Prompt) -> bool:
        """Text-to-image portraits."""
        request = request_of(prompt)
        return _is_t2i(request) and request is not None and request.target.face is not None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]: exp(-error / .02) of the nearest of all faces."""
        return _scores(samples, self.applies, lambda verdict: verdict.face)


class Instruction(RewardModel[NoOptions]):
    """Share of an edit instruction that was carried out, in [0, 1]."""

    name = "tinyworld-instruction"

    def applies(self, prompt: Prompt) -> bool:
        """Edits of the world."""
        return _source_of(prompt) is not None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]."""
        return _scores(samples, self.applies, lambda verdict: verdict.instruction)


class Preservation(RewardModel[NoOptions]):
    """How well an edit keeps the pixels it was not asked to change: exp(-MSE / .02), in [0, 1]."""

    name = "tinyworld-preservation"

    def applies(self, prompt: Prompt) -> bool:
        """Edits of the world."""
        return _source_of(prompt) is not None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]."""
        return _scores(samples, self.applies, lambda verdict: verdict.preservation)


class IdentityReward(RewardModel[NoOptions]):
    """Whether an edit of a face shows the same person as its source, in [0, 1].

    Share of skin, hair length, eyes and (unless the edit is about it) hair colour that agree, times how well-formed
    the face is.
    """

    name = "tinyworld-identity"

    def applies(self, prompt: Prompt) -> bool:
        """Edits whose source shows a face."""
        request = _source_of(prompt)
        return request is not None and request.source is not None and request.source.face is not None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]."""
        return _scores(samples, self.applies, lambda verdict: verdict.likeness)


class SharpnessOptions(Options):
    """What counts as sharp."""

    gain: float = Field(4.0, gt=0, description="Slope at zero; higher saturates earlier.")
    band: Literal["all", "fine"] = Field(
        "all",
        description="`all`: gradients of the picture. `fine`: of what a 3 x 3 blur takes away, so that texture pays "
        "more than layout.",
    )


class Sharpness(RewardModel[SharpnessOptions]):
    """tanh(gain * mean absolute gradient), in [0, 1): a proxy that is easy to game, kept to show reward hacking."""

    name = "tinyworld-sharpness"

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1); any picture can be judged, of this world or not."""
        values, status, reasons = [], [], []
        for sample in samples:
            finite = bool(torch.isfinite(sample.image).all())
            values.append(self._sharpness(sample.image.detach().float().cpu()) if finite else 0.0)
            status.append(Status.OK if finite else Status.FAILED)
            reasons.append("" if finite else "The picture holds values that are not finite.")
        return Scores(values=torch.tensor(values), status=tuple(status), reasons=tuple(reasons))

    def _sharpness(self, image: Tensor) -> float:
        picture = image.clamp(0, 1)
        if self.options.band == "fine":
            padded = torch.nn.functional.pad(picture[None], (1, 1, 1, 1), mode="replicate")
            picture = picture - torch.nn.functional.avg_pool2d(padded, 3, stride=1)[0]
        gradient = (picture.diff(dim=1).abs().mean() + picture.diff(dim=2).abs().mean()) / 2
        return float(torch.tanh(self.options.gain * gradient))


def _is_t2i(request: Request | None) -> bool:
    return request is not None and request.source is None


def _source_of(prompt: Prompt) -> Request | None:
    """The request of an edit, None for any other prompt."""
    request = request_of(prompt)
    return None if request is None or request.source is None else request


def _scores(
    samples: Sequence[Sample], applies: Callable[[Prompt], bool], credit: Callable[[Verdict], float | None]
) -> Scores:
    """Read one number off the shared verdict of each sample that can be judged."""
    status = [Status.OK if applies(sample.prompt) else Status.NOT_APPLICABLE for sample in samples]
    reasons = ["" if state is Status.OK else "Not a prompt that this reward judges." for state in status]
    asked: list[tuple[int, Request]] = []
    for row, sample in enumerate(samples):
        request = request_of(sample.prompt)
        if status[row] is not Status.OK or request is None:
            continue
        if reason := flaw(sample.image):
            status[row], reasons[row] = Status.FAILED, reason
        else:
            asked.append((row, request))
    values = torch.zeros(len(samples))
    verdicts = JUDGE.verdicts([samples[row].image for row, _ in asked], [request for _, request in asked])
    for (row, _), verdict in zip(asked, verdicts, strict=True):
        value = credit(verdict)
        if value is None:
            status[row], reasons[row] = Status.NOT_APPLICABLE, "The verdict says nothing about this."
        else:
            values[row] = value
    return Scores(values=values, status=tuple(status), reasons=tuple(reasons))
