"""Networks that place pictures and texts in one space, CLIP and SigLIP, loaded from a folder or from the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from loguru import logger
from pydantic import Field
from torch import Tensor

from velatura.api import Context, Options, Sample, Scores, Status, VelaturaError

FAMILIES = ("clip", "siglip")
"""`model_type` of the configurations that can be loaded; SigLIP 2 of fixed resolution is a `siglip`, too."""
PARTS = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "preprocessing of pictures"}
"""What messages call them."""
WHOLE = 0.9
"""A tokenizer with fewer words than this share of what its network knows has lost its files."""


class EncoderOptions(Options):
    """How a network for pictures and texts is loaded and run."""

    revision: str | None = Field(None, description="On the hub: branch, tag or commit of `path`.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="`auto` is the device of the run; or `cuda:1`."
    )
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Of the network; scores are fp32.")
    batch: int = Field(32, ge=1, description="Pictures in one forward.")


class DualEncoder:
    """A frozen CLIP or SigLIP with its tokenizer and its preprocessing of pictures.

    Pictures are rounded to 8 bits and resized by Pillow, whether or not torchvision is installed, so that a score does
    not depend on what else is on the machine.
    """

    def __init__(
        self, user: str, path: str, processors: Sequence[str], options: EncoderOptions, context: Context,
        network: Callable[[Any], Any] | None = None,
    ):  # fmt: skip
        """`user`: the component, for messages; `processors`: where tokenizer and preprocessing may be, in order.

        `network` makes the model of the configuration in `path`; None opens the one that lies there.

        Raises:
            VelaturaError: something is not there, or is of another kind.
        """
        from transformers import AutoConfig, AutoModel

        self._user, self._options, self._context, self._path = user, options, context, path
        self.device = context.device if options.device == "auto" else torch.device(options.device)
        dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        config = self._load(AutoConfig, path)
        if config.model_type not in FAMILIES:
            raise VelaturaError(
                f"{path!r} holds a model of type '{config.model_type}', and '{user}' takes {' and '.join(FAMILIES)}."
            )
        self.longest = int(config.text_config.max_position_embeddings)
        """Tokens of a text that are read."""
        self._is_siglip = config.model_type == "siglip"
        self._words, self._told = int(config.text_config.vocab_size), False
        self._pictures, self._tokenizer = self._processors(processors)
        model = self._load(AutoModel, path, dtype=dtype) if network is None else network(config)
        self.model = model.to(self.device, dtype).requires_grad_(False).train(False)

    @property
    def logit_bias(self) -> float:
        """The trained bias of a SigLIP; 0 for CLIP, which has none."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach().float())

    @property
    def logit_scale(self) -> float:
        """exp of the trained logit scale; 100 in the published CLIP models."""
        return float(self.model.logit_scale.detach().float().exp())

    def cosines(self, samples: Sequence[Sample]) -> Tensor:
        """[B] fp32 cosine, in [-1, 1], of each picture with the text of its prompt."""
        size = self._options.batch
        return torch.cat([self._cosines(samples[i : i + size]) for i in range(0, len(samples), size)])

    def _cosines(self, samples: Sequence[Sample]) -> Tensor:
        texts = list(dict.fromkeys(sample.prompt.text for sample in samples))
        rows = [texts.index(sample.prompt.text) for sample in samples]
        pictures = [to_bytes(sample.image) for sample in samples]
        pixels = self._pictures(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        with torch.no_grad():
            seen = self.model(**self._tokens(texts), pixel_values=pixels.to(self.device, self.model.dtype))
        cosines: Tensor = (seen.image_embeds.float() * seen.text_embeds.float()[rows]).sum(-1)
        return cosines.cpu()

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Ids of the texts, padded to the full length, so that a score never depends on its neighbours.

        SigLIP was trained on lower case and attends to the padding; CLIP was not and does not.
        """
        words = [text.lower() for text in texts] if self._is_siglip else list(texts)
        self._tell(words)
        tokens = self._tokenizer(
            words, padding="max_length", truncation=True, max_length=self.longest, return_tensors="pt"
        )
        names = ("input_ids",) if self._is_siglip else ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.device) for name in names}

    def _tell(self, texts: Sequence[str]) -> None:
        """Say that a text is too long, the first time that one is."""
        if self._told:
            return
        one_more = self._tokenizer(texts, truncation=True, max_length=self.longest + 1)["input_ids"]
        cut = [text for text, ids in zip(texts, one_more, strict=True) if len(ids) > self.longest]
        if cut:
            self._told = True
            logger.warning(
                "'{}' reads {} tokens of a prompt and judges nothing of what comes after them. The first that is "
                "longer: {!r}. This is said once.", self._user, self.longest, cut[0][:80],
            )  # fmt: skip

    def _processors(self, names: Sequence[str]) -> tuple[Any, Any]:
        """Preprocessing and tokenizer from the first of the folders or names that has them.

        transformers makes an empty tokenizer of a folder without one, hence the check of its size.
        """
        from transformers import AutoImageProcessor, AutoTokenizer

        for name in names:
            try:
                pictures = self._load(AutoImageProcessor, name, backend="pil")
                tokenizer = self._load(AutoTokenizer, name)
            except VelaturaError:
                if name == names[-1]:
                    raise
                continue
            if WHOLE * self._words <= len(tokenizer) <= self._words:
                return pictures, tokenizer
        raise VelaturaError(
            f"'{self._user}': the tokenizer of {names[-1]!r} has {len(tokenizer)} words, and the network of "
            f"{self._path!r} knows {self._words}. Copy the tokenizer's files beside the network, or set 'processor'."
        )

    def _load(self, kind: Any, name: str, **options: Any) -> Any:
        """`kind.from_pretrained` of a folder seen from the recipe, or of a name on the hub.

        Raises:
            VelaturaError: it is in neither.
        """
        local = self._context.resolve(name)
        revision = self._options.revision if name == self._path else None
        try:
            return kind.from_pretrained(str(local) if local.exists() else name, revision=revision, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = (str(error).strip().split("\n")[0] or type(error).__name__).removesuffix(".")
            raise VelaturaError(
                f"'{self._user}' finds no {PARTS.get(kind.__name__, 'model')} in {name!r}: it is neither a folder that "
                f"has one ({local}) nor to be had from the hub ({reason}). Check the name, log in with `hf auth "
                "login` if the model is gated, or give the path of a folder, seen from the recipe."
            ) from error


def scores_of(encoder: DualEncoder, samples: Sequence[Sample], scale: float) -> Scores:
    """`scale` times the cosine for every picture whose numbers are finite."""
    status = [Status.OK if bool(sample.image.isfinite().all()) else Status.FAILED for sample in samples]
    shown = [row for row, state in enumerate(status) if state is Status.OK]
    values = torch.zeros(len(samples))
    if shown:
        values[shown] = scale * encoder.cosines([samples[row] for row in shown])
    reasons = ["" if state is Status.OK else "The picture holds values that are not finite." for state in status]
    return Scores(values=values, status=tuple(status), reasons=tuple(reasons))


def to_bytes(image: Tensor) -> Any:
    """[3 H W] in [0, 1] to uint8 [H W 3]."""
    return (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
