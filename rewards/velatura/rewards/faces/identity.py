"""The reward `face-identity`: whether an edit shows the persons that its source shows."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from velatura.api import Context, Prompt, Sample, Scores, Status, VelaturaError
from velatura.rewards.faces.instructions import adds_people, changed
from velatura.rewards.faces.matching import assigned, ramp
from velatura.rewards.faces.options import FaceOptions, FaceReward, asked_for, open_reader, surely
from velatura.rewards.faces.reading import Faces, Reader
from velatura.rewards.measured import Measured, measured

REMEMBERED = 512
"""Source pictures whose faces are kept, in memory only."""
SHARP = 0.2
"""Sharpness from which a source face counts in full."""


class IdentityOptions(FaceOptions):
    """Options of `face-identity`."""

    full: float | None = Field(
        None, ge=0, description="Distance of embeddings up to which a face counts in full; null: .35 (ArcFace: .89)."
    )
    none: float | None = Field(
        None, gt=0, description="Distance from which it counts nothing; null: .6 (ArcFace: 1.34)."
    )
    prior: float = Field(
        0.1, ge=0, description="How much nearer a face is taken to be where it stands in the same place, at most."
    )
    extra: float = Field(0.1, ge=0, description="What a face too many costs, over the number of faces to be kept.")
    sources: Literal["first", "all"] = Field(
        "first", description="Whose faces are to be kept: of the first source picture, or of every one."
    )
    min_face: int = Field(48, ge=16, description="Pixels of height that a source face needs; half of it in the edit.")
    min_sharpness: float = Field(0.1, ge=0, le=1, description="Of source faces; below .1 nobody recognises them.")
    max_yaw: float = Field(60.0, gt=0, le=90, description="Degrees that a source face may be turned away.")
    field: str = Field(
        "keeps_identity", min_length=1, description="The metadata field, true or false, that overrules the instruction."
    )
    faces_field: str = Field("faces", min_length=1, description="The metadata field with the faces an edit may show.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.full is not None and self.none is not None and self.full >= self.none:
            raise ValueError(f"`full` ({self.full:g}) is not below `none` ({self.none:g}): nearer faces count more")
        return self


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a prompt's sources ask for."""

    faces: Faces | None
    """Those to be kept; None where there is none that could be recognised again."""
    seen: int
    """All faces there, also those that are too small or blurred."""
    reason: str = ""
    """Why there are none."""


class FaceIdentity(FaceReward[IdentityOptions]):
    """Share of the source's persons that the edit still shows, in [0, 1].

    r = sum_j q_j v_j / sum_j q_j - extra e / J, at least 0, over the J faces of the source that can be recognised, with
    v_j = clip((none - d_j) / (none - full), 0, 1), d_j the distance of its embedding to that of the face it is taken
    for, q_j the confidence of the detector times sharpness, and e the faces beyond those of the source. Faces are taken
    one to one, with the least sum of distances, less `prior` where places overlap. One that is gone has v_j = 0. `full`
    is about what two good photographs of a person have, so that copying pixels earns no more than showing the person.

    Faces: MTCNN; identity: dlib's network, 128 numbers; both from inside this package. The source is the gate, never
    the edit: without a face of `min_face` pixels, sharp and towards us, the reward does not apply, nor where the
    instruction removes, replaces, hides, turns, ages or stylises it (read by words, English and Chinese; the metadata
    field `keeps_identity` overrules them).

    Known holes. Leaving the source as it is scores 1: give instruction rewards twice the weight. Words tell a style
    from a thing in the picture most of the time: an instruction that is misread excuses its faces. Blur and low
    resolution count as another face; glasses, beards and age move it; people of one family, children, and groups rare
    in its training data (mostly celebrities) are told apart less well. Profiles and painted faces are not found.
    """

    name = "face-identity"
    _reader: Reader | None = None

    def setup(self, context: Context) -> None:
        """Load the networks.

        Raises:
            VelaturaError: weights or an extra are missing, or `full` is not below `none`.
        """
        self._reader = open_reader(self.name, self.options, context)
        self._memory: OrderedDict[str, Faces] = OrderedDict()
        full, none = self._bounds(self._reader)
        if full >= none:
            raise VelaturaError(f"'{self.name}': `full` ({full:g}) is not below `none` ({none:g}): set both.")

    def dimension(self) -> str:
        """Whether it is still the same person."""
        return "identity"

    def applies(self, prompt: Prompt) -> bool:
        """Edits whose instruction leaves faces recognisable."""
        return bool(prompt.sources) and not self._excused(prompt)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]; distances stand in the notes."""
        if self._reader is None:
            raise VelaturaError(f"'{self.name}' has no networks yet: call `setup` before it is asked.")
        wanted = self._wanted([sample.prompt for sample in samples])
        found: dict[int, Measured] = {}
        judged = []
        for sample in samples:
            if reason := self._silent(sample.prompt, wanted):
                found[id(sample)] = reason
            elif bool(sample.image.isfinite().all()):
                judged.append(sample)
        shown = self._reader.read([sample.image for sample in judged], self.options.min_face / 2, recognise=True)
        for sample, faces in zip(judged, shown, strict=True):
            found[id(sample)] = self._judge(sample.prompt, wanted[id(sample.prompt)], faces, self._reader)
        return measured(samples, lambda sample: found[id(sample)])

    def _bounds(self, reader: Reader) -> tuple[float, float]:
        full, none = self.options.full, self.options.none
        return reader.full if full is None else full, reader.none if none is None else none

    @property
    def _sure(self) -> float:
        assert self._reader is not None
        return surely(self.options, self._reader)

    def _excused(self, prompt: Prompt) -> str:
        """Why the faces need not stay what they are; empty where they have to."""
        said = prompt.metadata.get(self.options.field)
        if said is None:
            change = changed(prompt.text)
            return f"The instruction {change} faces" if change else ""
        if not isinstance(said, bool):
            raise VelaturaError(
                f"Prompt {prompt.id!r}: its metadata field {self.options.field!r} holds {said!r}, and true or false "
                "belongs there: whether the faces of the source have to stay recognisable."
            )
        return "" if said else f"The metadata field {self.options.field!r} is false"

    def _silent(self, prompt: Prompt, wanted: dict[int, Wanted]) -> Measured | None:
        """What is said without looking at the picture; None where it has to be looked at."""
        if not prompt.sources:
            return Measured(status=Status.NOT_APPLICABLE, reason="The prompt has no source picture")
        if reason := self._excused(prompt):
            return Measured(status=Status.NOT_APPLICABLE, reason=reason)
        if not all(bool(source.isfinite().all()) for source in self._looked_at(prompt)):
            return Measured(status=Status.FAILED, reason="The source holds values that are not finite")
        want = wanted[id(prompt)]
        return Measured(status=Status.NOT_APPLICABLE, reason=want.reason) if want.faces is None else None

    def _looked_at(self, prompt: Prompt) -> tuple[Tensor, ...]:
        return prompt.sources[:1] if self.options.sources == "first" else prompt.sources

    def _wanted(self, prompts: Sequence[Prompt]) -> dict[int, Wanted]:
        """What each prompt asks for, by its `id()`: tasks may share names. Sources read before are remembered."""
        keys: dict[int, list[str]] = {}
        unread: dict[str, Tensor] = {}
        for prompt in prompts:
            sources = self._looked_at(prompt)
            if id(prompt) in keys or not self.applies(prompt) or not all(bool(s.isfinite().all()) for s in sources):
                continue
            keys[id(prompt)] = [fingerprint(source) for source in sources]
            unread.update({key: s for key, s in zip(keys[id(prompt)], sources, strict=True) if key not in self._memory})
        assert self._reader is not None
        read = self._reader.read(list(unread.values()), self.options.min_face / 2, recognise=True)
        self._memory.update(zip(unread, read, strict=True))
        wanted = {row: self._usable([self._memory[key] for key in own]) for row, own in keys.items()}
        for key in [key for own in keys.values() for key in own]:
            self._memory.move_to_end(key)
        while len(self._memory) > REMEMBERED:
            self._memory.popitem(last=False)
        return wanted

    def _usable(self, sources: Sequence[Faces]) -> Wanted:
        """The faces of the sources that could be recognised again."""
        options, seen = self.options, sum(len(faces) for faces in sources)
        if not seen:
            return Wanted(None, 0, "The source shows no face")
        kept = [
            faces.only(
                (faces.confidence >= self._sure)
                & (faces.heights >= options.min_face)
                & (faces.sharpness >= options.min_sharpness)
                & (faces.yaw.abs() <= options.max_yaw)
            )
            for faces in sources
        ]
        if not any(len(faces) for faces in kept):
            return Wanted(None, seen, f"No face of the source can be recognised: {described(sources[0])}")
        return Wanted(joined(kept), seen)

    def _judge(self, prompt: Prompt, wanted: Wanted, shown: Faces, reader: Reader) -> Measured:
        required = wanted.faces
        assert required is not None
        full, none = self._bounds(reader)
        apart = assigned(required, shown, self.options.prior)
        weight = required.confidence.double() * (required.sharpness / SHARP).clamp_max(1)
        kept = float((weight * ramp(apart, none, full)).sum() / weight.sum())
        allowed = max(wanted.seen, asked_for(prompt, self.options.faces_field) or 0)
        sure = int((shown.confidence >= self._sure).sum())
        extra = 0 if adds_people(prompt.text) else max(0, sure - allowed)
        said = ", ".join(f"{one:.2f}" for one in apart.tolist())
        note = f"{len(shown)} faces for {len(required)}, at distances {said}"
        return Measured(max(0.0, kept - self.options.extra * extra / len(required)), note=note)


def joined(parts: Sequence[Faces]) -> Faces:
    """All faces of several pictures, with boxes as shares of theirs so that places can be compared."""
    fields = ("points", "confidence", "yaw", "misfit", "sharpness", "embeddings")
    boxes = [faces.boxes / torch.tensor([faces.size[1], faces.size[0]] * 2) for faces in parts]
    return Faces(
        boxes=torch.cat(boxes),
        **{name: torch.cat([getattr(one, name) for one in parts]) for name in fields},
        size=(1, 1),
    )


def described(faces: Faces) -> str:
    """The surest face of a source, for people."""
    if not len(faces):
        return "the first source shows none"
    height, sharp, yaw = float(faces.heights[0]), float(faces.sharpness[0]), float(faces.yaw[0].abs())
    return (
        f"the surest is {height:.0f} pixels high, turned by {yaw:.0f} degrees, of sharpness {sharp:.2f} and confidence "
        f"{float(faces.confidence[0]):.2f}"
    )


def fingerprint(image: Tensor) -> str:
    """The SHA-256 of a picture's shape and values."""
    pixels = image.detach().float().cpu().contiguous()
    return hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
