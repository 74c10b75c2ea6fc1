"""Credit in [0, 1] for each single thing that a request asks of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from velatura.plugins.tinyworld.perceive import (
    FACE_COLOURS,
    SHAPE_COLOURS,
    Blob,
    FaceMatch,
    Labels,
    beside_faces,
    find_blobs,
    look,
    match_faces,
)
from velatura.plugins.tinyworld.render import CELL, SIZE, Mask, Picture, footprint, head, render
from velatura.plugins.tinyworld.scenes import BACKGROUNDS, EXPRESSIONS, SHAPES, Identity, Request, Scene, Step, Thing

FADE = 0.02
"""Mean squared error at which credit for likeness to known pixels has fallen to 1 / e."""
ROUND_TRIP = 0.004
"""Mean squared error of a face that the autoencoder alone may cause."""
APART = 4.0
"""Pixels between the middles of two shapes from which one is beside or above the other."""

Checks = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One picture as perceived."""

    picture: Picture
    """[3, 24, 24]."""
    label: Labels
    """[24, 24]."""
    clean: float
    blobs: list[Blob]
    """Empty where a face is expected."""
    match: FaceMatch | None
    """None where shapes are expected."""

    @property
    def face(self) -> float:
        """How well-formed the face is: 1 up to the error of the autoencoder's round trip, then falling off."""
        return float(np.exp(-max(0.0, self.match.error - ROUND_TRIP) / FADE)) if self.match else 0.0


def perceive(pictures: Picture, *, face: bool) -> list[Sight]:
    """Look at [B, 3, 24, 24], expecting faces or shapes."""
    pixels = look(pictures, face=face)
    matches: Sequence[FaceMatch | None] = match_faces(pictures) if face else [None] * len(pictures)
    blobs: list[list[Blob]] = [[] for _ in pictures] if face else find_blobs(pixels.label)
    rows = zip(pictures, pixels.label, pixels.clean.tolist(), blobs, matches, strict=True)
    return [
        Sight(picture=picture, label=label, clean=clean, blobs=found, match=match)
        for picture, label, clean, found, match in rows
    ]


def mean(checks: Mapping[str, float]) -> float:
    """The mean credit."""
    return sum(checks.values()) / len(checks)


def shape_checks(sight: Sight, request: Request) -> Checks:
    """`colour`, `shape`, `count`, `background`, and `relation` or `style` where asked for."""
    wanted = request.target.things
    pairs = assign(wanted, sight.blobs)
    checks = thing_checks(wanted, sight.blobs, pairs)
    checks["background"] = _background_of_shapes(sight, request.target.background)
    if request.relation is not None:
        checks["relation"] = _relation(request.relation, pairs, sight.blobs)
    if any(thing.outlined for thing in wanted):
        credit = [_drawn_as(wanted[thing], sight.blobs[blob]) for thing, blob in pairs.items()]
        checks["style"] = sum(credit) / len(wanted)
    return checks


def thing_checks(wanted: Sequence[Thing], blobs: Sequence[Blob], pairs: Mapping[int, int]) -> Checks:
    """`colour`, `shape` and `count` of all shapes together."""
    if not wanted:
        empty = float(not blobs)
        return {"colour": empty, "shape": empty, "count": empty}
    colour = sum(wanted[thing].colour == blobs[blob].colour for thing, blob in pairs.items())
    shape = sum(shape_credit(wanted[thing], blobs[blob]) for thing, blob in pairs.items())
    count = max(0.0, 1 - abs(len(blobs) - len(wanted)) / len(wanted))
    return {"colour": colour / len(wanted), "shape": shape / len(wanted), "count": count}


def assign(wanted: Sequence[Thing], blobs: Sequence[Blob]) -> dict[int, int]:
    """Which blob stands for which wanted shape, so that colours and shapes fit best jointly."""
    if not wanted or not blobs:
        return {}
    credit = [
        # Where colours are swapped, it is the colours that are wrong, not the shapes: these decide a tie.
        [0.99 * (thing.colour == blob.colour) + shape_credit(thing, blob) for blob in blobs]
        for thing in wanted
    ]
    things, chosen = linear_sum_assignment(np.array(credit), maximize=True)
    return dict(zip(things.tolist(), chosen.tolist(), strict=True))


def shape_credit(thing: Thing, blob: Blob) -> float:
    """0 if another shape fits better; else rising with the overlap, 0 at .3 and 1 at .75.

    Outlines count as the shape only where they are asked for; elsewhere the shape must be filled.
    """
    row = SHAPES.index(thing.shape)
    fits = blob.overlap.max(1)
    if fits[row] < fits.max():
        return 0.0
    overlap = float(fits[row] if thing.outlined else blob.overlap[row, 0])
    return min(max((overlap - 0.3) / 0.45, 0.0), 1.0)


def _drawn_as(thing: Thing, blob: Blob) -> float:
    """1 where the style that is asked for, outline or filled, fits better by .2; 0 where the other does."""
    filled, outline = blob.overlap[SHAPES.index(thing.shape)]
    better = outline - filled if thing.outlined else filled - outline
    return float(np.clip(0.5 + 2.5 * better, 0, 1))


def _relation(relation: str, pairs: Mapping[int, int], blobs: Sequence[Blob]) -> float:
    """1 if the first shape lies where it should by `APART` pixels and by more than it lies aside; 0 if not seen."""
    if len(pairs) < 2:
        return 0.0
    down = blobs[pairs[0]].centre[0] - blobs[pairs[1]].centre[0]
    right = blobs[pairs[0]].centre[1] - blobs[pairs[1]].centre[1]
    along = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
    aside = abs(down) if relation in ("left of", "right of") else abs(right)
    return float(along >= APART and along > aside)


def _background_of_shapes(sight: Sight, background: str) -> float:
    """Share of the pixels outside coloured regions that have the background's colour."""
    outside = sight.label < len(BACKGROUNDS)  # unclear pixels (-1) included
    if not outside.any():
        return 0.0
    return float((sight.label == SHAPE_COLOURS.index(background))[outside].mean())


def face_checks(sight: Sight, target: Scene) -> Checks:
    """`face`, `expression` and `background`."""
    match, face = sight.match, target.face
    if match is None or face is None:
        raise ValueError("These checks are for portraits.")
    beside = sight.label[beside_faces()] == FACE_COLOURS.index(target.background)
    expression = float(match.expression[EXPRESSIONS.index(face.expression)]) * sight.face
    return {"face": sight.face, "expression": expression, "background": float(beside.mean())}


def traits(seen: Identity, wanted: Identity, *, hair: bool = True) -> float:
    """Share of skin, hair length, eyes and (with `hair`) hair colour that agree."""
    agree = [seen.skin == wanted.skin, seen.long == wanted.long, seen.eyes == wanted.eyes]
    if hair:
        agree.append(seen.hair == wanted.hair)
    return sum(agree) / len(agree)


def step_credits(sight: Sight, request: Request, source: Scene) -> Checks:
    """Credit of every step of an edit, named like its kind; a second one of the same kind is `<kind> 2`."""
    credits: Checks = {}
    for step in request.steps:
        name = f"{step.kind} 2" if step.kind in credits else step.kind
        credits[name] = _step(sight, step, source, request.target)
    return credits


def _step(sight: Sight, step: Step, source: Scene, target: Scene) -> float:
    if step.kind == "background":
        return _background_done(sight, source, target)
    if step.kind == "expression":
        return face_checks(sight, target)["expression"]
    if step.kind == "hair":
        return _hair_done(sight, source, step.value)
    if step.thing is None:
        raise ValueError(f"'{step.kind}' needs the shape it concerns.")
    if step.kind == "add":
        return _added(sight, step.thing, source, target)
    pixels = sight.label[footprint(step.thing)]
    if step.kind == "recolour":
        return float((pixels == SHAPE_COLOURS.index(step.value)).mean())
    around = [(sight.label == row).sum() for row in range(len(BACKGROUNDS))]
    return float((pixels == int(np.argmax(around))).mean())


def _background_done(sight: Sight, source: Scene, target: Scene) -> float:
    """Share of the pixels that are background before and after which have the new colour."""
    if target.face is not None:
        return face_checks(sight, target)["background"]
    covered = np.zeros((SIZE, SIZE), dtype=bool)
    for thing in source.things + target.things:
        covered |= footprint(thing)
    return float((sight.label == SHAPE_COLOURS.index(target.background))[~covered].mean())


def _hair_done(sight: Sight, source: Scene, colour: str) -> float:
    if source.face is None:
        raise ValueError("Hair needs a face.")
    hair, _ = head(source.face.identity.long, source.face.shift)
    return float((sight.label == FACE_COLOURS.index(f"{colour} hair"))[hair].mean())


def _added(sight: Sight, thing: Thing, source: Scene, target: Scene) -> float:
    """.4 for a new blob of the colour, the rest for its shape, shared among all new blobs: one thing was asked for.

    Blobs where something else belongs are not new; one where something was to be removed may be, or may be that thing.
    """
    taken = {other.cell for other in target.things if other != thing}
    vacated = {other.cell for other in source.things} - taken
    free = [blob for blob in sight.blobs if _cell(blob) not in taken]
    new = sum(_cell(blob) not in vacated for blob in free)
    credit = [0.4 + 0.6 * shape_credit(thing, blob) for blob in free if blob.colour == thing.colour]
    return max(credit, default=0.0) / max(1, new)


def _cell(blob: Blob) -> int:
    row, column = (int(coordinate + 0.5) // CELL for coordinate in blob.centre)
    return 2 * row + column


def untouched(request: Request, source: Scene) -> Mask:
    """[24, 24] pixels that the edit leaves alone: where source and target agree, less the cells free for `add`."""
    same = (render(source) == render(request.target)).all(0)
    if any(step.kind == "add" for step in request.steps):
        added = {step.thing for step in request.steps if step.kind == "add"}
        kept = [thing for thing in source.things + request.target.things if thing not in added]
        for cell in set(range(4)) - {thing.cell for thing in kept}:
            row, column = divmod(cell, 2)
            same[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = False
    return np.asarray(same)


def preservation(sight: Sight, request: Request, source: Scene) -> float:
    """exp(-MSE / .02) over the untouched pixels."""
    mask = untouched(request, source)
    if not mask.any():
        return 1.0
    error = float(((sight.picture - render(source))[:, mask] ** 2).mean())
    return float(np.exp(-error / FADE))
