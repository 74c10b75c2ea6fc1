"""Rewards that compare a picture with its prompt in the space of a CLIP or SigLIP: `pickscore` and `clip-score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from velatura.api import Context, Evaluator, Prompt, RewardModel, Sample, Scores, VelaturaError
from velatura.rewards.dual_encoder import DualEncoder, EncoderOptions, scores_of


class PickScoreOptions(EncoderOptions):
    """Options of `pickscore`."""

    path: str = Field("yuvalkirstain/PickScore_v1", description="A folder, seen from the recipe, or a name on the hub.")
    processor: str | None = Field(
        None,
        description="Where tokenizer and preprocessing are; null: beside the network, or else those it was published "
        "with, laion/CLIP-ViT-H-14-laion2B-s32B-b79K.",
    )
    divisor: float = Field(
        1.0, gt=0, description="Scores are divided by this; 26, as in Flow-GRPO's code, brings them near 1."
    )


class PickScore(RewardModel[PickScoreOptions]):
    """How much people prefer a picture for its prompt: exp(logit scale) cos(picture, text) / divisor.

    A CLIP ViT-H fine-tuned on pairs that people chose between (Pick-a-Pic, arXiv:2305.01569). The logit scale is 100:
    ordinary pictures score 18 to 24, and a lead of 1 predicts that 73 % prefer it. The published code is MIT; the card
    of the weights names no licence.

    Known holes. It sees 224 x 224 pixels, cropped to the middle: neither small flaws nor the margins of wide pictures
    count. It likes saturation and gloss more than what was asked for. It reads 77 tokens of a prompt, English ones. It
    was learnt from pictures of Stable Diffusion 1 and 2, older than the models that it trains. It has no notion of an
    edit and does not apply to prompts with source images. Keep a judge that is not trained on beside it.
    """

    name = "pickscore"
    operational = frozenset({"device", "batch"})
    _encoder: DualEncoder | None = None

    def setup(self, context: Context) -> None:
        """Load the network.

        Raises:
            VelaturaError: it is not there.
        """
        options, published = self.options, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        places = [options.processor] if options.processor is not None else [options.path, published]
        self._encoder = DualEncoder(self.name, options.path, places, options, context)

    def needs_card(self) -> bool:
        """Learned."""
        return True

    def dimension(self) -> str:
        """Taste, more than what was asked for."""
        return "aesthetics"

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that draw from text."""
        return not prompt.sources

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B], 18 to 24 for ordinary pictures with `divisor` 1; higher is better."""
        encoder = loaded(self._encoder, self.name)
        return scores_of(encoder, samples, encoder.logit_scale / self.options.divisor)


class ClipScoreOptions(EncoderOptions):
    """Options of `clip-score`."""

    path: str = Field(
        "openai/clip-vit-large-patch14",
        description="A CLIP or SigLIP: a folder, seen from the recipe, or a name on the hub.",
    )
    processor: str | None = Field(None, description="Where tokenizer and preprocessing are; null: beside the network.")
    scale: float = Field(100.0, gt=0, description="Cosines are multiplied by this.")


class ClipScore(RewardModel[ClipScoreOptions]):
    """How well a picture fits its prompt: scale cos(picture, text), of any CLIP or SigLIP (arXiv:2104.08718).

    Nothing is cut off at 0, unlike in the paper, so that bad pictures differ, too. With OpenAI's CLIP pictures that fit
    score 25 to 35; SigLIP's cosines are lower, and scores of different networks cannot be compared. Licences are those
    of the network: OpenAI's CLIP is MIT, the SigLIPs of Google Apache 2.0.

    Known holes. A bag of words: it hardly sees who does what to whom, counts, negations and positions. It reads text in
    pictures, so a picture of the written prompt scores high. It sees as many pixels as its network takes, of the middle
    with CLIP and stretched with SigLIP, and 77 (CLIP) or 64 (SigLIP) tokens. It does not apply to edits.
    """

    name = "clip-score"
    operational = frozenset({"device", "batch"})
    _encoder: DualEncoder | None = None

    def setup(self, context: Context) -> None:
        """Load the network.

        Raises:
            VelaturaError: it is not there, or neither a CLIP nor a SigLIP.
        """
        self._encoder = open_clip(self.name, self.options, context)

    def needs_card(self) -> bool:
        """Learned."""
        return True

    def dimension(self) -> str:
        """What is there."""
        return "alignment"

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that draw from text."""
        return not prompt.sources

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [-scale, scale]; higher is better."""
        return scores_of(loaded(self._encoder, self.name), samples, self.options.scale)


class ClipMetric(Evaluator[ClipScoreOptions]):
    """`clip_score`: what the reward of the same name says, for networks that nothing is trained on.

    Give it another network than the rewards have: one that was optimised measures how well it was optimised. None for
    edits. The holes are those of the reward.
    """

    name = "clip-score"
    _encoder: DualEncoder | None = None

    def setup(self, context: Context) -> None:
        """Load the network.

        Raises:
            VelaturaError: it is not there, or neither a CLIP nor a SigLIP.
        """
        self._encoder = open_clip(self.name, self.options, context)

    def evaluate(self, samples: Sequence[Sample]) -> Mapping[str, Sequence[float | None]]:
        """One metric of B values in [-scale, scale]."""
        shown = [row for row, sample in enumerate(samples) if not sample.prompt.sources]
        scores = scores_of(loaded(self._encoder, self.name), [samples[row] for row in shown], self.options.scale)
        column: list[float | None] = [None] * len(samples)
        for row, value, status, reason in zip(
            shown, scores.values.tolist(), scores.status, scores.reasons, strict=True
        ):
            if status != 0:
                raise VelaturaError(f"Picture for prompt {samples[row].prompt.id!r} cannot be measured. {reason}")
            column[row] = value
        return {"clip_score": column}


def open_clip(user: str, options: ClipScoreOptions, context: Context) -> DualEncoder:
    """The network of `options`, for the component `user`."""
    return DualEncoder(user, options.path, [options.processor or options.path], options, context)


def loaded(encoder: DualEncoder | None, user: str) -> DualEncoder:
    """`encoder`, which `setup` has made.

    Raises:
        VelaturaError: it has not.
    """
    if encoder is None:
        raise VelaturaError(f"'{user}' has no network yet: call `setup` before it is asked.")
    return encoder
