"""What a reward and its server say to each other: JSON, version 1. Pictures are PNG files, never pickles.

A request holds prompts and pictures, an answer one entry for each picture, in their order: a value, or a status with
its reason. docs/http-rewards.md shows both.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from velatura.core.types import Prompt, Sample, Scores, Status

SCHEMA, VERSION = "velatura-reward", 1
PREFIX = "data:image/png;base64,"
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
"""Pictures of at most 8 bits for each channel, as PIL calls them; deeper ones would be cut."""
LARGEST_PICTURE, LARGEST_REQUEST = 2**25, 2**28
"""Pixels of one picture, and of all pictures of a request."""
NAMES = {Status.FAILED: "failed", Status.REFUSED: "refused", Status.NOT_APPLICABLE: "not_applicable"}
"""How an answer says that there is no score."""
STATUS = {name: status for status, name in NAMES.items()}


class Malformed(Exception):
    """A request or an answer is not what the schema says."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WirePrompt(_Part):
    """What was asked for."""

    id: str
    text: str
    task: str = "t2i"
    category: str = "general"
    sources: list[str] = Field(default_factory=list)
    """Data URLs."""
    size: tuple[int, int] | None = Field(None, strict=False)
    metadata: dict[str, Any] = Field(default_factory=dict)


class WirePicture(_Part):
    """What came of it."""

    prompt: int = Field(ge=0)
    """Row of its prompt."""
    image: str
    """A data URL."""
    seed: int = 0


class Request(_Part):
    """Pictures that one reward is to score."""

    version: Literal[1]
    reward: str
    """Name of the reward, as its server calls it."""
    prompts: list[WirePrompt]
    pictures: list[WirePicture]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What an answer says of one picture."""

    status: Status
    value: float = 0.0
    reason: str = ""
    note: str = ""


def request_for(reward: str, samples: Sequence[Sample], to_url: Callable[[Tensor], str]) -> dict[str, Any]:
    """A request as plain data; a prompt that several pictures share is sent once, with its sources.

    Of `metadata` goes along what JSON can say.
    """
    rows: dict[int, int] = {}
    prompts: list[dict[str, Any]] = []
    for sample in samples:
        if id(sample.prompt) not in rows:
            rows[id(sample.prompt)] = len(prompts)
            prompts.append(_as_data(sample.prompt, to_url))
    pictures = [{"prompt": rows[id(s.prompt)], "image": to_url(s.image), "seed": s.seed} for s in samples]
    return {"version": VERSION, "reward": reward, "prompts": prompts, "pictures": pictures}


def _as_data(prompt: Prompt, to_url: Callable[[Tensor], str]) -> dict[str, Any]:
    return {
        "id": prompt.id, "text": prompt.text, "task": prompt.task, "category": prompt.category,
        "sources": [to_url(source) for source in prompt.sources],
        "size": None if prompt.size is None else list(prompt.size),
        "metadata": {key: value for key, value in prompt.metadata.items() if _is_plain(value)},
    }  # fmt: skip


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the value back as it is."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def read_request(body: bytes) -> Request:
    """The request in the body of a POST.

    Raises:
        Malformed: it is none, or of another version.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the request is no JSON: {error}") from error
    if isinstance(data, dict) and data.get("version") != VERSION:
        raise Malformed(f"the request has version {data.get('version')!r} of the schema; this server knows {VERSION}")
    try:
        request = Request.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise Malformed(f"{place}: {first['msg']}") from error
    wrong = [i for i, picture in enumerate(request.pictures) if picture.prompt >= len(request.prompts)]
    if wrong:
        raise Malformed(f"pictures.{wrong[0]}.prompt: there are only {len(request.prompts)} prompts")
    return request


def samples_of(request: Request) -> list[Sample]:
    """The pictures of a request, decoded.

    Raises:
        Malformed: one of them is no PNG file, is deeper than 8 bits, or they are too large.
    """
    room = [LARGEST_REQUEST]
    prompts = [
        Prompt(
            id=given.id, text=given.text, task=given.task, category=given.category, size=given.size,
            sources=tuple(_decoded(url, f"prompts.{p}.sources.{s}", room) for s, url in enumerate(given.sources)),
            metadata=given.metadata, foreign=True,
        )
        for p, given in enumerate(request.prompts)
    ]  # fmt: skip
    return [
        Sample(prompt=prompts[given.prompt], image=_decoded(given.image, f"pictures.{i}.image", room), seed=given.seed)
        for i, given in enumerate(request.pictures)
    ]


def _decoded(url: str, place: str, room: list[int]) -> Tensor:
    """`3 H W` in [0, 1]; takes its pixels from the room that is left."""
    if not url.startswith(PREFIX):
        raise Malformed(f"{place}: a picture is written as {PREFIX}...")
    try:
        content = base64.b64decode(url[len(PREFIX) :], validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            _require_room(picture, place, room)
            pixels = np.array(picture.convert("RGB"))
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise Malformed(f"{place}: it is no PNG file: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Malformed(f"{place}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def _require_room(picture: Image.Image, place: str, room: list[int]) -> None:
    """Before a pixel is decoded."""
    if picture.mode not in MODES:
        raise Malformed(f"{place}: it is of mode {picture.mode}; send 8 bits for each channel")
    size = picture.width * picture.height
    room[0] -= size
    if size > LARGEST_PICTURE or room[0] < 0:
        most = LARGEST_PICTURE if size > LARGEST_PICTURE else LARGEST_REQUEST
        what = "a picture" if size > LARGEST_PICTURE else "all pictures of a request together"
        raise Malformed(f"{place}: {what} may have {most} pixels at most; send smaller or fewer ones")


def answer_of(reward: str, version: str, scores: Scores) -> dict[str, Any]:
    """An answer as plain data."""
    reasons = scores.reasons or ("",) * len(scores.status)
    notes = scores.notes or ("",) * len(scores.status)
    entries: list[dict[str, Any]] = []
    for value, status, reason, note in zip(scores.values.tolist(), scores.status, reasons, notes, strict=True):
        entry = {"value": value} if status is Status.OK else {"status": NAMES[status], "reason": reason}
        entries.append(entry | ({"note": note} if note else {}))
    return {"version": VERSION, "reward": reward, "reward_version": version, "scores": entries}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer that is one."""

    entries: tuple[Entry, ...]
    reward_version: str | None
    """Which version of the reward says that it answered; None where the server does not say."""


def read_answer(body: bytes, reward: str, count: int) -> Answer:
    """The answer for `count` pictures. Nothing in it that is not a finite number becomes a value.

    Raises:
        Malformed: it is no answer of this schema, is another reward's, or has another number of entries.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the answer is no JSON: {body[:80]!r}") from error
    if not isinstance(data, dict) or not isinstance(data.get("scores"), list):
        raise Malformed(f"the answer has no list `scores`: {body[:80]!r}")
    if data.get("version", VERSION) != VERSION:
        raise Malformed(f"the answer has version {data['version']!r} of the schema, not {VERSION}")
    if data.get("reward", reward) != reward:
        raise Malformed(f"reward {data['reward']!r} answered in place of {reward!r}")
    if len(data["scores"]) != count:
        raise Malformed(f"the answer has {len(data['scores'])} scores for {count} pictures")
    version = data.get("reward_version")
    entries = tuple(_entry(entry) for entry in data["scores"])
    return Answer(entries=entries, reward_version=None if version is None else str(version))


def _entry(data: Any) -> Entry:
    """One score. What is odd about it is a failure of this picture alone."""
    if not isinstance(data, dict):
        return Entry(status=Status.FAILED, reason=f"the server's score is {_short(data)}, no object")
    reason, note = str(data.get("reason") or ""), str(data.get("note") or "")
    said = data.get("status", "ok")
    if said != "ok":
        status = STATUS.get(said) if isinstance(said, str) else None
        if status is None:
            known = ", ".join(["ok", *STATUS])
            return Entry(status=Status.FAILED, reason=f"the server's status is {_short(said)}, none of {known}")
        return Entry(status=status, reason=reason or f"the server says {said} and no reason", note=note)
    value = data.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Entry(status=Status.FAILED, reason=f"the server's value is {_short(value)}, no number", note=note)
    if not abs(value) <= torch.finfo(torch.float32).max:
        return Entry(status=Status.FAILED, reason=f"the server's value is {_short(value)}, not a finite one", note=note)
    return Entry(status=Status.OK, value=float(value), note=note)


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
