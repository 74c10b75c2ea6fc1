"""From scenes to pictures: [3, 24, 24] float32 in [0, 1], drawn without anti-aliasing from ready-made pieces."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt

from velatura.plugins.tinyworld.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXPRESSIONS,
    IDENTITIES,
    SHAPES,
    Face,
    Identity,
    Scene,
    Thing,
)

Picture = npt.NDArray[np.float32]
"""[3, 24, 24] (or [B, 3, 24, 24]) in [0, 1]."""
Mask = npt.NDArray[np.bool_]

SIZE = 24
CELL = 12
THING = 8
MARGIN = (CELL - THING) // 2
SHIFTS = (-1, 0, 1)


def _rgb(red: int, green: int, blue: int) -> Picture:
    return np.array([red / 255, green / 255, blue / 255], dtype=np.float32)


PALETTE: Mapping[str, Picture] = {
    "white": _rgb(255, 255, 255),
    "black": _rgb(0, 0, 0),
    "red": _rgb(225, 30, 35),
    "blue": _rgb(30, 70, 230),
    "green": _rgb(25, 165, 60),
    "yellow": _rgb(250, 210, 25),
}
SKIN: Mapping[str, Picture] = {"light": _rgb(255, 219, 186), "tan": _rgb(212, 154, 106), "dark": _rgb(98, 62, 46)}
HAIR_COLOUR: Mapping[str, Picture] = {
    "brown": _rgb(150, 82, 28),
    "yellow": _rgb(250, 210, 25),
    "orange": _rgb(240, 112, 16),
    "pink": _rgb(245, 110, 185),
}
EYE_COLOUR: Mapping[str, Picture] = {"blue": _rgb(30, 70, 230), "black": _rgb(0, 0, 0)}
LIPS = _rgb(205, 20, 45)


@cache
def template(shape: str, outlined: bool) -> Mask:
    """[8, 8] the pixels of a shape; an outline is those within one pixel, diagonals included, of what is outside."""
    filled = _filled(shape)
    if not outlined:
        return filled
    padded = np.pad(filled, 2)
    reach = range(-1, 2)
    core = np.logical_and.reduce([np.roll(padded, (y, x), (0, 1)) for y in reach for x in reach])
    return np.asarray(filled & ~core[2:-2, 2:-2])


def _filled(shape: str) -> Mask:
    y, x = np.mgrid[:THING, :THING] - (THING - 1) / 2
    if shape == "circle":
        return np.asarray(y**2 + x**2 <= 16.5)
    if shape == "square":
        return np.ones((THING, THING), dtype=bool)
    return np.asarray(np.abs(x) <= (y + 4.5) / 2 + 0.01)


@cache
def _canvas(background: str) -> Picture:
    return np.ascontiguousarray(np.broadcast_to(PALETTE[background][:, None, None], (3, SIZE, SIZE)))


@cache
def _stamp(colour: str, shape: str, outlined: bool, background: str) -> Picture:
    mask = template(shape, outlined)
    return np.where(mask, PALETTE[colour][:, None, None], PALETTE[background][:, None, None])


def corner(thing: Thing) -> tuple[int, int]:
    """Row and column of the top left pixel of a shape."""
    row, column = divmod(thing.cell, 2)
    return row * CELL + MARGIN + thing.down, column * CELL + MARGIN + thing.right


def footprint(thing: Thing) -> Mask:
    """[24, 24] the pixels a shape covers."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    row, column = corner(thing)
    mask[row : row + THING, column : column + THING] = template(thing.shape, thing.outlined)
    return mask


@cache
def head(long: bool, shift: int) -> tuple[Mask, Mask]:
    """[24, 24] the pixels of hair and of skin (eyes and mouth included)."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    x = np.abs(x - 11.5 - shift)
    skin = (x / 6.3) ** 2 + ((y - 13.5) / 8.2) ** 2 <= 1
    hair = ((x / (8.6 if long else 7.4)) ** 2 + ((y - 10.5) / 9.2) ** 2 <= 1) & (y <= 11)
    if long:
        hair |= (x <= 8.6) & (y > 10) & (y <= 21)
    fringe = (y <= 8) & (x <= 7)
    skin &= ~fringe
    return hair & ~skin, skin


@cache
def eyes(shift: int) -> Mask:
    """[24, 24] the pixels of both eyes."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    for left in (8, 14):
        mask[10:12, left + shift : left + 2 + shift] = True
    return mask


@cache
def mouth(expression: str, shift: int) -> Mask:
    """[24, 24] the pixels of the mouth."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    if expression == "neutral":
        mask[16, 9:15] = True
        return np.roll(mask, shift, 1)
    middle, ends = (17, 15) if expression == "smiling" else (15, 17)
    mask[middle, 9:15] = True
    mask[16, [8, 9, 14, 15]] = True
    mask[ends, [8, 15]] = True
    return np.roll(mask, shift, 1)


@cache
def _portrait(identity: Identity, expression: str, shift: int, background: str) -> Picture:
    picture = _canvas(background).copy()
    hair, skin = head(identity.long, shift)
    picture[:, hair] = HAIR_COLOUR[identity.hair][:, None]
    picture[:, skin] = SKIN[identity.skin][:, None]
    picture[:, eyes(shift)] = EYE_COLOUR[identity.eyes][:, None]
    picture[:, mouth(expression, shift)] = LIPS[:, None]
    return picture


def render(scene: Scene) -> Picture:
    """The picture of a scene, [3, 24, 24] float32 in [0, 1]; a fresh array."""
    if scene.face is not None:
        face = scene.face
        return _portrait(face.identity, face.expression, face.shift, scene.background).copy()
    picture = _canvas(scene.background).copy()
    for thing in scene.things:
        row, column = corner(thing)
        stamp = _stamp(thing.colour, thing.shape, thing.outlined, scene.background)
        picture[:, row : row + THING, column : column + THING] = stamp
    return picture


def faces() -> tuple[Face, ...]:
    """All faces at all places: 48 identities x 3 expressions x 3 shifts."""
    return tuple(
        Face(identity=identity, expression=expression, shift=shift)
        for identity in IDENTITIES
        for expression in EXPRESSIONS
        for shift in SHIFTS
    )


def warm() -> None:
    """Draw every piece once, so that no later call pays for it."""
    for background in BACKGROUNDS:
        for face in faces():
            _portrait(face.identity, face.expression, face.shift, background)
        for colour in COLOURS:
            for shape in SHAPES:
                for outlined in (False, True):
                    _stamp(colour, shape, outlined, background)
