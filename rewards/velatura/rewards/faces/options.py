"""Options that the rewards for faces share, and what becomes of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch
from loguru import logger
from pydantic import Field, model_validator

from velatura.api import Context, Options, Prompt, RewardModel, VelaturaError
from velatura.core.fingerprint import files_hash, options_fingerprint
from velatura.rewards.faces.detection import THRESHOLDS
from velatura.rewards.faces.reading import OwnReader, Reader

LEAST = THRESHOLDS[-1]
Given = TypeVar("Given", bound="FaceOptions")


class FaceOptions(Options):
    """How faces are found and recognised."""

    backend: Literal["own", "insightface"] = Field(
        "own",
        description="`own`: MTCNN and dlib's network with the weights that ship, under MIT and CC0; `insightface`: "
        "SCRFD and ArcFace by the extra of that name, whose weights are for research that is not commercial.",
    )
    insightface_model: str = Field(
        "buffalo_l", min_length=1, description="With `insightface`: the folder of weights in `insightface_root`/models."
    )
    insightface_root: str = Field(
        "~/.insightface", description="With `insightface`: where its weights lie, seen from the recipe."
    )
    accept_non_commercial: bool = Field(
        False, description="With `insightface`: that you keep to the terms of its weights has to be said here."
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="`auto` is the device of the run; or `cuda:1`."
    )
    batch: int = Field(32, ge=1, description="Faces in one forward of the recogniser.")

    min_confidence: float | None = Field(
        None,
        ge=0.5,
        le=1,
        description="Of the detector, for a face that counts as one: of a source, or too many; null: .9 (SCRFD: .6).",
    )

    @model_validator(mode="after")
    def _finds_such(self) -> Self:
        if self.backend == "own" and self.min_confidence is not None and self.min_confidence < LEAST:
            raise ValueError(f"`min_confidence` is {self.min_confidence:g}, and MTCNN names no face below {LEAST:g}")
        return self

    @model_validator(mode="after")
    def _licensed(self) -> Self:
        if self.backend == "insightface" and not self.accept_non_commercial:
            raise ValueError(
                "`backend: insightface` uses weights that InsightFace gives away for non-commercial research only. Set "
                "`accept_non_commercial: true` if that is what you do, or take `backend: own`, whose weights are under "
                "MIT and CC0"
            )
        return self


def weights_of(options: FaceOptions, base: Path) -> dict[str, str]:
    """File -> SHA-256 of the InsightFace weights, seen from the folder `base`; the package knows those of `own`."""
    if options.backend == "own":
        return {}
    folder = base / Path(options.insightface_root).expanduser() / "models" / options.insightface_model
    return {file.name: files_hash(file) for file in sorted(folder.glob("*.onnx"))}


class FaceReward(RewardModel[Given]):
    """What the rewards of faces have in common: neither device nor batch is a part of them, and their weights are."""

    operational = frozenset({"batch", "device"})

    def fingerprint(self, context: Context) -> str:
        """Changes with all options but the operational ones and the place of weights, and with the weights."""
        options = options_fingerprint(self, context, ("insightface_root",))
        held = weights_of(self.options, context.base)
        return "-".join([options, *(f"{name}:{digest}" for name, digest in held.items())])

    def identity(self) -> Mapping[str, str]:
        """The content of InsightFace weights whose place does not depend on the recipe's folder."""
        if not Path(self.options.insightface_root).expanduser().is_absolute():
            return {}
        return {f"weights {name}": digest[:16] for name, digest in weights_of(self.options, Path()).items()}


def open_reader(user: str, options: FaceOptions, context: Context) -> Reader:
    """The back-end that `options` name, for the component `user`.

    Raises:
        VelaturaError: something that it needs is missing or another.
    """
    device = context.device if options.device == "auto" else torch.device(options.device)
    if options.backend == "own":
        return OwnReader(device, options.batch)
    if importlib.util.find_spec("insightface") is None:
        raise VelaturaError(
            f"'{user}' with `backend: insightface` needs it. Install it: pip install \"velatura[insightface]\""
        )
    from velatura.rewards.faces.insight import InsightReader

    logger.warning(
        "'{}' recognises faces with the InsightFace weights {!r}, which are for non-commercial research only. The "
        "weights of `backend: own` are under MIT and CC0.", user, options.insightface_model,
    )  # fmt: skip
    root = context.resolve(Path(options.insightface_root).expanduser())
    return InsightReader(user, root, options.insightface_model, device)


def surely(options: FaceOptions, reader: Reader) -> float:
    """The confidence from which a face counts as one: what the recipe says, or what suits the detector."""
    return reader.sure if options.min_confidence is None else options.min_confidence


def asked_for(prompt: Prompt, field: str) -> int | None:
    """How many faces the metadata of `prompt` ask for under `field`; None where they do not say.

    Raises:
        VelaturaError: they say something else than a number.
    """
    if field not in prompt.metadata:
        return None
    value = prompt.metadata[field]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise VelaturaError(
            f"Prompt {prompt.id!r}: its metadata field {field!r} holds {value!r}. How many faces the picture should "
            'show belongs there: a whole number, like "metadata": {"' + field + '": 2}.'
        )
    return value
