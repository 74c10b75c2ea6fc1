"""Whether a picture is what was asked for: exact where a human would say yes or no, and with partial credit besides."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from velatura.plugins.tinyworld.checks import (
    Sight,
    assign,
    face_checks,
    mean,
    perceive,
    preservation,
    shape_checks,
    step_credits,
    thing_checks,
    traits,
)
from velatura.plugins.tinyworld.render import SIZE, Picture
from velatura.plugins.tinyworld.scenes import Request, Scene

PASSES: Mapping[str, float] = {
    "background": 0.9,
    "shape": 0.75,
    "face": 0.6,
    "expression": 0.5,
    "preservation": 0.6,
    "recolour": 0.8,
    "remove": 0.8,
    "add": 0.8,
    "hair": 0.8,
}
"""Credit from which a check counts as right; for a check not named here, full credit."""
MEMBER = 0.25
"""A face less well-formed than this is nobody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the verifier says of one picture."""

    soft: float
    """In [0, 1]. Text-to-image: mean of the checks. Edit: .5 instruction + .3 preservation + .2 objects."""
    strict: bool
    """Every check is right."""
    checks: Mapping[str, float]
    """Credit in [0, 1] of everything that was asked for."""
    clean: float
    """Share of pixels that are close to a colour of the world."""
    nameless: float
    """`soft`, but for a named portrait without the check of who it is."""
    nameless_strict: bool
    """`strict`, but for a named portrait without the check of who it is."""
    face: float | None = None
    """How well-formed the face is, in [0, 1]; None where no face is asked for."""
    identity: float | None = None
    """1 if it is the right person (the name's, or the source's), else 0; None where there is none to compare with."""
    likeness: float | None = None
    """Partial credit for the same in [0, 1]: share of traits that are right, times `face`."""
    expression: float | None = None
    """Credit for the expression in [0, 1]; None where no face is asked for."""
    instruction: float | None = None
    """Edits: mean credit of the steps."""
    preservation: float | None = None
    """Edits: exp(-MSE / .02) over the pixels that the edit leaves alone."""


def verify(pictures: Picture, requests: Sequence[Request]) -> list[Verdict]:
    """One verdict for each of B pictures [B, 3, 24, 24] in [0, 1]; each depends on its own picture alone."""
    verdicts: dict[int, Verdict] = {}
    for face in (False, True):
        rows = [row for row, request in enumerate(requests) if (request.target.face is not None) == face]
        if not rows:
            continue
        sights = perceive(np.ascontiguousarray(pictures[rows], dtype=np.float32), face=face)
        for row, sight in zip(rows, sights, strict=True):
            request = requests[row]
            verdicts[row] = _judge(sight, request)
    return [verdicts[row] for row in range(len(requests))]


def _right(checks: Mapping[str, float]) -> bool:
    return all(credit >= PASSES.get(name.removesuffix(" 2"), 0.999) for name, credit in checks.items())


def _judge(sight: Sight, request: Request) -> Verdict:
    if request.source is not None:
        return _judge_edit(sight, request, request.source)
    if request.target.face is None:
        checks = shape_checks(sight, request)
        soft, strict = mean(checks), _right(checks)
        return Verdict(
            soft=soft, strict=strict, checks=checks, clean=sight.clean, nameless=soft, nameless_strict=strict
        )
    checks = face_checks(sight, request.target)
    nameless, nameless_strict = mean(checks), _right(checks)
    identity, likeness = _person(sight, request.target, hair=True)
    if request.name is not None:
        checks["identity"] = likeness
    return Verdict(
        soft=mean(checks),
        strict=nameless_strict and (request.name is None or identity == 1),
        checks=checks,
        clean=sight.clean,
        nameless=nameless,
        nameless_strict=nameless_strict,
        face=sight.face,
        identity=identity if request.name is not None else None,
        likeness=likeness if request.name is not None else None,
        expression=checks["expression"],
    )


def _person(sight: Sight, target: Scene, *, hair: bool) -> tuple[float, float]:
    """Whether it is the person of `target` (0 or 1), and the share of traits that are right times `face`."""
    if sight.match is None or target.face is None:
        raise ValueError("Only portraits have an identity.")
    share = traits(sight.match.face.identity, target.face.identity, hair=hair)
    return float(share == 1 and sight.face >= MEMBER), share * sight.face


def _judge_edit(sight: Sight, request: Request, source: Scene) -> Verdict:
    steps = step_credits(sight, request, source)
    kept = preservation(sight, request, source)
    objects, identity, likeness = _edited_objects(sight, request)
    checks = {**steps, "preservation": kept, **objects}
    soft = 0.5 * mean(steps) + 0.3 * kept + 0.2 * mean(objects)
    # "identity" has partial credit among the checks; strictly it is one or nothing.
    strict = _right({name: credit for name, credit in checks.items() if name != "identity"}) and identity != 0
    return Verdict(
        soft=soft,
        strict=strict,
        checks=checks,
        clean=sight.clean,
        nameless=soft,
        nameless_strict=strict,
        face=sight.face if sight.match else None,
        identity=identity,
        likeness=likeness,
        expression=face_checks(sight, request.target)["expression"] if sight.match else None,
        instruction=mean(steps),
        preservation=kept,
    )


def _edited_objects(sight: Sight, request: Request) -> tuple[dict[str, float], float | None, float | None]:
    """Checks of what must be there after the edit, asked for or not; and of a face identity and likeness."""
    target = request.target
    if sight.match is None:
        return thing_checks(target.things, sight.blobs, assign(target.things, sight.blobs)), None, None
    hair = all(step.kind != "hair" for step in request.steps)
    identity, likeness = _person(sight, target, hair=hair)
    return {"face": sight.face, "identity": likeness}, identity, likeness


class Judge:
    """`verify` with a memory: several rewards ask about the same picture, from several threads; it is judged once."""

    def __init__(self, capacity: int = 8192) -> None:
        """Remember the `capacity` verdicts asked for last."""
        self.capacity = capacity
        self.verified = 0
        """Pictures that were not in memory."""
        self._memory: OrderedDict[tuple[bytes, Request], Verdict] = OrderedDict()
        self._lock = Lock()

    def verdicts(self, images: Sequence[Tensor], requests: Sequence[Request]) -> list[Verdict]:
        """One verdict per image [3, 24, 24] in [0, 1]."""
        pictures = [picture_of(image) for image in images]
        keys = [
            (blake2b(picture.tobytes(), digest_size=16).digest(), request)
            for picture, request in zip(pictures, requests, strict=True)
        ]
        with self._lock:  # a second thread with the same pictures waits and then finds them
            fresh = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._memory}
            if fresh:
                judged = verify(np.stack(list(fresh.values())), [request for _, request in fresh])
                self.verified += len(fresh)
                self._memory.update(zip(fresh, judged, strict=True))
            verdicts = [self._memory[key] for key in keys]
            for key in keys:
                self._memory.move_to_end(key)
            while len(self._memory) > self.capacity:
                self._memory.popitem(last=False)
        return verdicts


JUDGE = Judge()
"""The one that all rewards and the evaluator of this process share."""


def flaw(image: Tensor) -> str:
    """Why an image cannot be judged; empty if it can."""
    if tuple(image.shape) != (3, SIZE, SIZE):
        return f"The tiny world judges pictures of shape (3, {SIZE}, {SIZE}), this one has {tuple(image.shape)}."
    if not bool(torch.isfinite(image).all()):
        return "The picture holds values that are not finite."
    return ""


def picture_of(image: Tensor) -> Picture:
    """[3, 24, 24] as a contiguous float32 array clamped to [0, 1]."""
    return np.ascontiguousarray(image.detach().float().clamp(0, 1).cpu().numpy())
