"""What is to be seen in a picture, whoever made it: palette labels, coloured blobs, and the nearest face."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from velatura.plugins.tinyworld.render import (
    EYE_COLOUR,
    HAIR_COLOUR,
    LIPS,
    PALETTE,
    SHIFTS,
    SIZE,
    SKIN,
    THING,
    Mask,
    Picture,
    eyes,
    head,
    render,
    template,
)
from velatura.plugins.tinyworld.scenes import BACKGROUNDS, COLOURS, EXPRESSIONS, IDENTITIES, SHAPES, Face, Scene

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int8]
Whole = npt.NDArray[np.integer]

CLEAR = 0.4
"""RGB distance up to which a pixel has a colour at all. Half-way between red and white lies nearer to yellow."""
CLEAN = 0.22
"""RGB distance up to which a pixel is clean."""
SPECK = 6
"""Blobs of fewer pixels are not counted as objects; cleanliness sees them."""

SHAPE_COLOURS = (*BACKGROUNDS, *COLOURS)
FACE_COLOURS = ("white", "black", *(f"{hair} hair" for hair in HAIR_COLOUR), *SKIN, "lips", "blue eyes")
_SHAPE_PALETTE = np.stack([PALETTE[name] for name in SHAPE_COLOURS])
_FACE_PALETTE = np.stack(
    [PALETTE["white"], PALETTE["black"], *HAIR_COLOUR.values(), *SKIN.values(), LIPS, EYE_COLOUR["blue"]]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """Every pixel of B pictures, compared with a palette."""

    label: Labels
    """[B, 24, 24] row of the nearest palette colour, -1 where none is near."""
    clean: Floats
    """[B] share of pixels that are close to a palette colour, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One connected region of one colour."""

    colour: str
    area: int
    centre: tuple[float, float]
    """Row and column of the middle of its bounding box."""
    overlap: Floats
    """[3 shapes, 2] intersection over union with the filled and the outlined shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceMatch:
    """The nearest of all faces."""

    face: Face
    background: str
    error: float
    """Mean squared error to it."""
    expression: Floats
    """[3] credit of each expression in [0, 1]: 1 where the picture is that expression, 0 where it is another."""


def look(pictures: Picture, *, face: bool) -> Pixels:
    """Label the pixels of [B, 3, 24, 24] with the palette of faces or of shapes."""
    palette = _FACE_PALETTE if face else _SHAPE_PALETTE
    nearest = np.full((len(pictures), SIZE, SIZE), np.inf, dtype=np.float32)
    label = np.zeros(nearest.shape, dtype=np.int8)
    for row, colour in enumerate(palette):
        distance = ((pictures - colour[:, None, None]) ** 2).sum(1)
        closer = distance < nearest
        nearest = np.where(closer, distance, nearest)
        label[closer] = row
    label[nearest > CLEAR**2] = -1
    return Pixels(label=label, clean=(nearest <= CLEAN**2).mean((1, 2), dtype=np.float32))


def find_blobs(label: Labels) -> list[list[Blob]]:
    """The coloured blobs of B labelled pictures [B, 24, 24]; neighbours over a corner are connected."""
    layers = np.stack([label == SHAPE_COLOURS.index(colour) for colour in COLOURS], 1).reshape(-1, SIZE, SIZE)
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = True  # connected inside a layer, never from one picture to the next
    regions, count = ndimage.label(layers, structure=within)
    area = np.bincount(regions.ravel(), minlength=count + 1)
    boxes = ndimage.find_objects(regions)
    kept = [row for row in range(1, count + 1) if area[row] >= SPECK]
    found: list[list[Blob]] = [[] for _ in label]
    if not kept:
        return found
    bounds = np.array([[(side.start, side.stop) for side in boxes[row - 1]] for row in kept])
    overlaps = _overlaps(regions, np.array(kept), bounds, area[kept])
    for row, bound, overlap in zip(kept, bounds, overlaps, strict=True):
        picture, colour = divmod(int(bound[0, 0]), len(COLOURS))
        centre = (float(bound[1].mean()) - 0.5, float(bound[2].mean()) - 0.5)
        found[picture].append(Blob(colour=COLOURS[colour], area=int(area[row]), centre=centre, overlap=overlap))
    return found


@cache
def _templates() -> Floats:
    """[64, 6] shape-major: filled, outlined."""
    masks = [template(shape, outlined).ravel() for shape in SHAPES for outlined in (False, True)]
    return np.stack(masks, 1).astype(np.float32)


def _overlaps(regions: Whole, rows: Whole, bounds: Whole, area: Whole) -> Floats:
    """[n, 3, 2] best intersection over union of each region with the templates laid on its middle."""
    padded = np.pad(regions, ((0, 0), (THING, THING), (THING, THING)))
    corner = (bounds[:, 1:].sum(2) - THING) / 2 + THING
    # The middle of an odd box lies between pixels: try both sides.
    tops = np.stack([np.floor(corner[:, 0]), np.ceil(corner[:, 0])], 1).astype(int)[:, [0, 0, 1, 1]]
    lefts = np.stack([np.floor(corner[:, 1]), np.ceil(corner[:, 1])], 1).astype(int)[:, [0, 1, 0, 1]]
    step = np.arange(THING)
    window = padded[
        bounds[:, 0, 0][:, None, None, None],
        (tops[:, :, None] + step)[:, :, :, None],
        (lefts[:, :, None] + step)[:, :, None, :],
    ]
    inside = (window == rows[:, None, None, None]).reshape(len(rows), 4, -1).astype(np.float32)
    shared = inside @ _templates()
    union = area[:, None, None] + _templates().sum(0) - shared
    return np.asarray((shared / union).max(1), dtype=np.float32).reshape(-1, len(SHAPES), 2)


@cache
def _gallery() -> tuple[Floats, Floats, Floats]:
    """All faces as rows [864, 1728], their squared norms [864], and squared distances of expressions [48, 3, 3]."""
    rows = [
        render(Scene(background=background, face=Face(identity=identity, expression=expression, shift=shift))).ravel()
        for background in BACKGROUNDS
        for identity in IDENTITIES
        for expression in EXPRESSIONS
        for shift in SHIFTS
    ]
    gallery = np.stack(rows)
    grid = gallery.reshape(len(BACKGROUNDS), len(IDENTITIES), len(EXPRESSIONS), len(SHIFTS), -1)[0, :, :, 0]
    apart = ((grid[:, :, None] - grid[:, None]) ** 2).sum(-1)
    return gallery, (gallery**2).sum(1), apart


def match_faces(pictures: Picture) -> list[FaceMatch]:
    """The nearest face to each of [B, 3, 24, 24] by squared error, among all 864."""
    gallery, norms, apart = _gallery()
    flat = pictures.reshape(len(pictures), -1)
    distance = (flat**2).sum(1)[:, None] - 2 * flat @ gallery.T + norms
    grid = distance.reshape(-1, len(BACKGROUNDS), len(IDENTITIES), len(EXPRESSIONS), len(SHIFTS))
    matches = []
    for picture, best in enumerate(distance.argmin(1)):
        background, person, expression, shift = np.unravel_index(best, grid.shape[1:])
        errors = grid[picture, background, person, :, shift]
        face = Face(identity=IDENTITIES[person], expression=EXPRESSIONS[expression], shift=SHIFTS[shift])
        error = max(0.0, float(distance[picture, best])) / flat.shape[1]
        credit = _expression_credit(errors, apart[person])
        matches.append(FaceMatch(face=face, background=BACKGROUNDS[background], error=error, expression=credit))
    return matches


def _expression_credit(errors: Floats, apart: Floats) -> Floats:
    """[3] 1/2 + 1/2 (error of the best other - own error) / (distance between the two), clipped to [0, 1]."""
    credit = np.empty(len(errors), dtype=np.float32)
    for own in range(len(errors)):
        others = [other for other in range(len(errors)) if other != own]
        best = min(others, key=lambda other: float(errors[other]))
        credit[own] = 0.5 + 0.5 * (errors[best] - errors[own]) / apart[own, best]
    return np.clip(credit, 0, 1)


@cache
def beside_faces() -> Mask:
    """[24, 24] pixels that are background in every portrait."""
    covered = [part for long in (False, True) for shift in SHIFTS for part in (*head(long, shift), eyes(shift))]
    return np.asarray(~np.logical_or.reduce(covered))
