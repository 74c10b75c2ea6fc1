"""The reward `aesthetic`: a small head that was fitted to ratings, on the features of a frozen image encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from velatura.api import Context, Sample, Scores, VelaturaError
from velatura.rewards.dual_encoder import to_bytes
from velatura.rewards.pretrained import NetworkOptions, NetworkReward, opened, read_weights, ready, scored, weights_file

LAYER = re.compile(r"^(?:layers|scoring_head)\.(\d+)\.(weight|bias)$")
"""Names in the two published heads: improved-aesthetic-predictor's and aesthetic-predictor-v2-5's."""
KINDS = {"clip": "CLIP", "siglip": "SigLIP"}


class AestheticOptions(NetworkOptions):
    """Options of `aesthetic`."""

    path: str = Field(
        "trl-lib/ddpo-aesthetic-predictor",
        description="Weights of the head: a file or its folder, seen from the recipe, or a name on the hub.",
    )
    file: str = Field("aesthetic-model.pth", description="The file in `path`.")
    encoder: str = Field(
        "openai/clip-vit-large-patch14",
        description="The CLIP or SigLIP that the head was fitted on; for version 2.5 google/siglip-so400m-patch14-384.",
    )


class Aesthetic(NetworkReward[AestheticOptions]):
    """How highly people rated pictures like this one, about 1 to 10: head(e / |e|), e the features of the picture.

    By default LAION's aesthetic predictor v2: CLIP ViT-L/14, its projected features, and five linear layers without
    anything between them, fitted to ratings of SAC, AVA and logos. Head Apache 2.0, OpenAI's CLIP MIT. With a SigLIP as
    `encoder` the features are the pooled ones, as version 2.5 takes them; head and code of that one are AGPL 3.0, which
    binds who offers a service with it. The layers are read off the file, and `torch.load` reads tensors alone.

    Known holes. It never sees the prompt: beside a reward that does, or every picture becomes the same sunset. It likes
    painterly light, soft backgrounds and portraits, sees 224 x 224 (384 x 384) pixels of the middle, and is the reward
    that is easiest to game.
    """

    name = "aesthetic"
    _network: tuple[Any, Any, nn.Module] | None = None

    def setup(self, context: Context) -> None:
        """Load encoder and head.

        Raises:
            VelaturaError: one of them is not there, or they do not fit.
        """
        options = self.options
        path = weights_file(self.name, options.path, options.file, options.revision, context)
        encoder, pictures = self._encoder(context)
        head = head_of(self.name, path, read_weights(self.name, path))
        width = int(encoder.config.projection_dim if _is_clip(encoder) else encoder.config.hidden_size)
        if head[0].in_features != width:
            raise VelaturaError(
                f"'{self.name}': the head in {path} takes {head[0].in_features} features, and {options.encoder!r} "
                f"has {width}. Set 'encoder' to the network that the head was fitted on."
            )
        self._network = (encoder, pictures, head.to(options.place(context)))

    def _encoder(self, context: Context) -> tuple[Any, Any]:
        """The encoder and its preprocessing of pictures."""
        import transformers

        name = self.options.encoder
        config = opened(self.name, transformers.AutoConfig, name, context)
        kind = config.model_type.removesuffix("_vision_model")
        if kind not in KINDS:
            raise VelaturaError(f"'{self.name}': {name!r} is of type '{kind}'; it takes {' or '.join(KINDS)}.")
        made: Any = transformers.CLIPVisionModelWithProjection if kind == "clip" else transformers.SiglipVisionModel
        eye = getattr(config, "vision_config", config)
        if kind == "clip":
            eye.projection_dim = config.projection_dim  # some folders say it of the whole model alone
        encoder = opened(self.name, made, name, context, config=eye, dtype=self.options.precision)
        pictures = opened(self.name, transformers.AutoImageProcessor, name, context, "preprocessing", backend="pil")
        return encoder.to(self.options.place(context)).requires_grad_(False).train(False), pictures

    def dimension(self) -> str:
        """Taste."""
        return "aesthetics"

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B], about 1 to 10; any prompt, as it is not read. Higher is better."""
        return scored(samples, self.options.batch, self._judge)

    def _judge(self, samples: Sequence[Sample]) -> Tensor:
        encoder, pictures, head = ready(self._network, self.name)
        shown = [to_bytes(sample.image) for sample in samples]
        pixels = pictures(shown, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        with torch.no_grad():
            seen = encoder(pixel_values=pixels.to(encoder.device, encoder.dtype))
            features = (seen.image_embeds if _is_clip(encoder) else seen.pooler_output).float()
            found: Tensor = head(features / features.norm(dim=-1, keepdim=True))
        return found[:, 0]


def _is_clip(encoder: Any) -> bool:
    return bool(encoder.config.model_type.startswith("clip"))


def head_of(user: str, path: Path, weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Linear layers in the order of their numbers; nothing but dropout was ever between them.

    Raises:
        VelaturaError: the file holds something else.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in weights.items():
        found = LAYER.match(name)
        if found is None:
            raise VelaturaError(
                f"'{user}': {path} holds {name!r}, which is no layer of an aesthetic head (`layers.0.weight`, or "
                "`scoring_head.0.weight` of version 2.5). Heads of another shape are not known."
            )
        layers.setdefault(int(found[1]), {})[found[2]] = value.float()
    made, ends = nn.Sequential(), list[int]()
    for number in sorted(layers):
        layer = layers[number]
        width = int(ends[-1] if ends else layer["weight"].shape[1])
        if set(layer) != {"weight", "bias"} or layer["weight"].ndim != 2 or layer["weight"].shape[1] != width:
            raise VelaturaError(f"'{user}': layer {number} in {path} does not follow the one before it.")
        linear = nn.Linear(width, layer["weight"].shape[0])
        linear.load_state_dict(layer)
        made.append(linear)
        ends.append(linear.out_features)
    if not ends or ends[-1] != 1:
        raise VelaturaError(f"'{user}': the head in {path} does not end in one number.")
    return made.requires_grad_(False).train(False)
