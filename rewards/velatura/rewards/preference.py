"""Rewards in the space of a CLIP or SigLIP, with weights or a formula of their own: `hpsv2`, `siglip-score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from velatura.api import Context, Prompt, Sample, Scores, VelaturaError
from velatura.rewards.dual_encoder import DualEncoder, EncoderOptions, to_bytes
from velatura.rewards.open_clip_weights import to_transformers
from velatura.rewards.pretrained import NetworkReward, filled, read_weights, ready, scored, weights_file

HPS_BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""What HPS v2 was fine-tuned from."""


class HpsV2Options(EncoderOptions):
    """Options of `hpsv2`."""

    path: str = Field(
        "xswu/HPSv2", description="A file of weights or its folder, seen from the recipe, or a name on the hub."
    )
    file: str = Field(
        "HPS_v2.1_compressed.pt", description="The file in `path`; `HPS_v2_compressed.pt` is version 2.0."
    )
    base: str = Field(
        HPS_BASE,
        description="Folder or name on the hub that has configuration, tokenizer and preprocessing of the network.",
    )
    scale: float = Field(100.0, gt=0, description="Cosines are multiplied by this; 1 is the published score.")


class HpsV2(NetworkReward[HpsV2Options]):
    """How much people prefer a picture for its prompt: scale cos(picture, text), with the weights of HPS v2.1.

    A CLIP ViT-H-14 fine-tuned on 800,000 choices of people (arXiv:2306.09341). Its file has open_clip's names, which
    are translated; nothing in it is run. Ordinary pictures score 20 to 33 with `scale` 100. Code Apache 2.0; see the
    card of the weights.

    As its authors do, a picture is scaled until its longer side has 224 pixels, and black is put around it to a square:
    nothing is cut off.

    Known holes. It sees 224 x 224 pixels, of a long picture fewer, and 77 tokens. It likes saturated, glossy and
    plain-background pictures, and is the reward most often seen to be gamed that way. The authors' script resizes
    float tensors, here it is bytes by Pillow, so scores differ from theirs in the third digit. It does not apply to
    edits.
    """

    name = "hpsv2"
    _encoder: DualEncoder | None = None

    def setup(self, context: Context) -> None:
        """Load the network.

        Raises:
            VelaturaError: weights or base are not there, or do not fit each other.
        """
        options = self.options
        path = weights_file(self.name, options.path, options.file, options.revision, context)
        plain = options.model_copy(update={"revision": None})
        network = partial(self._network, path)
        self._encoder = DualEncoder(self.name, options.base, [options.base], plain, context, network)

    def _network(self, path: Path, config: Any) -> Any:
        from transformers import CLIPModel

        weights = read_weights(self.name, path)
        named = weights if "visual_projection.weight" in weights else to_transformers(weights)
        return filled(self.name, path, CLIPModel, config, named)

    def dimension(self) -> str:
        """Taste, more than what was asked for."""
        return "aesthetics"

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that draw from text."""
        return not prompt.sources

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [-scale, scale]; higher is better."""
        encoder: DualEncoder = ready(self._encoder, self.name)
        side = int(encoder.model.config.vision_config.image_size)

        def values(shown: Sequence[Sample]) -> Tensor:
            return self.options.scale * encoder.cosines([replace(s, image=boxed(s.image, side)) for s in shown])

        return scored(samples, len(samples) or 1, values)


def boxed(image: Tensor, side: int) -> Tensor:
    """`3 H W` in [0, 1] to `3 side side`: the longer side is scaled to `side`, and black is put around the rest."""
    picture = Image.fromarray(to_bytes(image))
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    square = Image.new("RGB", (side, side))
    square.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


class SiglipScoreOptions(EncoderOptions):
    """Options of `siglip-score`."""

    path: str = Field(
        "google/siglip2-so400m-patch14-384",
        description="A SigLIP of fixed resolution: a folder, seen from the recipe, or a name on the hub.",
    )
    processor: str | None = Field(None, description="Where tokenizer and preprocessing are; null: beside the network.")
    value: Literal["logit", "probability"] = Field(
        "logit", description="`probability` is the sigmoid of the logit: the fit in [0, 1], flat at both ends."
    )


class SiglipScore(NetworkReward[SiglipScoreOptions]):
    """Whether a picture and its prompt belong together, as SigLIP was trained to say: exp(scale) cos + bias.

    Unlike the cosines of `clip-score` these logits mean something alone: the sigmoid of one is the probability that the
    two are a pair (arXiv:2303.15343; SigLIP 2 arXiv:2502.14786). Google's SigLIPs are Apache 2.0.

    Known holes. Those of `clip-score`: a bag of words, which reads text in pictures. Pictures are stretched to a
    square. 64 tokens of a prompt are read, in lower case. It does not apply to edits.
    """

    name = "siglip-score"
    _encoder: DualEncoder | None = None

    def setup(self, context: Context) -> None:
        """Load the network.

        Raises:
            VelaturaError: it is not there, or is no SigLIP.
        """
        options = self.options
        places = [options.processor or options.path]
        encoder = DualEncoder(self.name, options.path, places, options, context)
        if getattr(encoder.model, "logit_bias", None) is None:
            raise VelaturaError(
                f"'{self.name}': {options.path!r} is no SigLIP, it has no logit bias. 'clip-score' takes any CLIP."
            )
        self._encoder = encoder

    def dimension(self) -> str:
        """What is there."""
        return "alignment"

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that draw from text."""
        return not prompt.sources

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B]: logits, about -20 to 5, or probabilities in [0, 1]; higher is better."""
        encoder: DualEncoder = ready(self._encoder, self.name)
        is_logit, scale, bias = self.options.value == "logit", encoder.logit_scale, encoder.logit_bias

        def values(shown: Sequence[Sample]) -> Any:
            logits = scale * encoder.cosines(shown) + bias
            return logits if is_logit else logits.sigmoid()

        return scored(samples, len(samples) or 1, values)
