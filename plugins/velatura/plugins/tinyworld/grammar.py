"""What can be asked for, in words, and which of it is held out.

A fifth of the texts of every text-to-image category and of the contents of edits belong to `eval`, chosen by a hash of
what they mean (`a circle left of a square` means `a square right of a circle`), and never occur in `train`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from itertools import permutations, product
from typing import Literal

from velatura.plugins.tinyworld.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXPRESSIONS,
    HAIR,
    IDENTITIES,
    NAMES,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Face,
    Request,
    Scene,
    Step,
    Thing,
)

Split = Literal["train", "eval"]
T2I_CATEGORIES = ("single", "pair", "relation", "count", "style", "portrait")
OPTIONAL_CATEGORIES = ("mixed",)
"""Text-to-image categories that come only where they are named: two shapes, one or both outlined."""
EDIT_CATEGORIES = ("recolour", "remove", "add", "background", "expression", "hair", "two-step")

_PLAIN = tuple(product(COLOURS, SHAPES))
_OPPOSITE: Mapping[str, str] = {"right of": "left of", "below": "above"}
_NEIGHBOURS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "left of": ((0, 1), (2, 3)),
    "right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}
_FACE_STEPS = ("background", "expression", "hair")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The content of one text-to-image prompt: everything but where things lie."""

    category: str
    text: str
    meaning: str
    """The same for texts that mean the same; decides the split."""
    background: str
    things: tuple[Thing, ...] = ()
    relation: str | None = None
    name: str | None = None
    expression: str = ""

    def place(self, rng: random.Random) -> Request:
        """One picture that grants the wish, things laid out at random."""
        if self.name is not None:
            face = Face(identity=NAMES[self.name], expression=self.expression, shift=rng.randrange(-1, 2))
            scene = Scene(background=self.background, face=face)
        else:
            cells = rng.choice(_NEIGHBOURS[self.relation]) if self.relation else rng.sample(range(4), len(self.things))
            placed = tuple(jitter(thing, cell, rng) for thing, cell in zip(self.things, cells, strict=True))
            scene = Scene(background=self.background, things=placed)
        return Request(category=self.category, text=self.text, target=scene, relation=self.relation, name=self.name)


def jitter(thing: Thing, cell: int, rng: random.Random) -> Thing:
    """The same shape in `cell`, up to one pixel off its middle."""
    return replace(thing, cell=cell, down=rng.randrange(-1, 2), right=rng.randrange(-1, 2))


def _digest(content: str) -> int:
    return int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "big")


def _single() -> list[Wish]:
    return [
        _shapes("single", f"a {colour} {shape} on {background}", background, (Thing(colour=colour, shape=shape),))
        for (colour, shape), background in product(_PLAIN, BACKGROUNDS)
    ]


def _style() -> list[Wish]:
    things = [Thing(colour=colour, shape=shape, outlined=True) for colour, shape in _PLAIN]
    return [
        _shapes("style", f"an {thing.noun} on {background}", background, (thing,))
        for thing, background in product(things, BACKGROUNDS)
    ]


def _pair() -> list[Wish]:
    things = [Thing(colour=colour, shape=shape) for colour, shape in _PLAIN]
    return [
        _shapes("pair", f"a {one.noun} and a {other.noun} on {background}", background, (one, other))
        for (one, other), background in product(permutations(things, 2), BACKGROUNDS)
    ]


def _mixed() -> list[Wish]:
    things = [Thing(colour=colour, shape=shape, outlined=way) for way in (True, False) for colour, shape in _PLAIN]
    wishes = []
    for (one, other), background in product(permutations(things, 2), BACKGROUNDS):
        if (one.outlined or other.outlined) and (one.colour, one.shape) != (other.colour, other.shape):
            named = [f"{'an' if thing.outlined else 'a'} {thing.noun}" for thing in (one, other)]
            wishes.append(_shapes("mixed", f"{' and '.join(named)} on {background}", background, (one, other)))
    return wishes


def _relation() -> list[Wish]:
    things = [Thing(colour=colour, shape=shape) for colour, shape in _PLAIN]
    wishes = []
    for (one, other), relation, background in product(permutations(things, 2), RELATIONS, BACKGROUNDS):
        first, second = (other, one) if relation in _OPPOSITE else (one, other)
        meaning = f"relation: {first.noun} {_OPPOSITE.get(relation, relation)} {second.noun} on {background}"
        text = f"a {one.noun} {relation} a {other.noun} on {background}"
        wish = _shapes("relation", text, background, (one, other))
        wishes.append(replace(wish, relation=relation, meaning=meaning))
    return wishes


def _count() -> list[Wish]:
    wishes = []
    for (colour, shape), (count, word), background in product(_PLAIN, NUMBERS.items(), BACKGROUNDS):
        things = (Thing(colour=colour, shape=shape),) * count
        wishes.append(_shapes("count", f"{word} {colour} {shape}s on {background}", background, things))
    return wishes


def _portrait() -> list[Wish]:
    wishes = []
    for name, expression, background in product(NAMES, EXPRESSIONS, BACKGROUNDS):
        text = f"portrait of {name} {expression} on {background}"
        wishes.append(
            Wish(category="portrait", text=text, meaning=text, background=background, name=name, expression=expression)
        )
    return wishes


def _shapes(category: str, text: str, background: str, things: tuple[Thing, ...]) -> Wish:
    meaning = f"{category}: {' + '.join(sorted(thing.noun for thing in things))} on {background}"
    return Wish(category=category, text=text, meaning=meaning, background=background, things=things)


_WISHES: Mapping[str, Callable[[], list[Wish]]] = {
    "single": _single,
    "pair": _pair,
    "mixed": _mixed,
    "relation": _relation,
    "count": _count,
    "style": _style,
    "portrait": _portrait,
}


@cache
def wishes(category: str, split: Split) -> tuple[Wish, ...]:
    """All wishes of a text-to-image category that belong to a split, in a fixed order that looks random."""
    everything = sorted(_WISHES[category](), key=lambda wish: _digest(wish.text))
    meanings = sorted({wish.meaning for wish in everything}, key=_digest)
    held_out = set(meanings[: round(len(meanings) / 5)])
    return tuple(wish for wish in everything if (wish.meaning in held_out) == (split == "eval"))


def edit_split(source: Scene, steps: tuple[Step, ...]) -> Split:
    """Where an edit belongs: a hash of what is in the source and what is to be done with it."""
    content = sorted(thing.noun for thing in source.things)
    if source.face is not None:
        identity = source.face.identity
        content = [identity.skin, identity.hair, str(identity.long), identity.eyes, source.face.expression]
    instruction = sorted(step.text for step in steps)
    return "eval" if _digest(" + ".join(content + instruction)) % 5 == 0 else "train"


def draw_edit(category: str, split: Split, rng: random.Random, source: Scene | None = None) -> Request:
    """A random edit of a category that belongs to a split, of `source` or of a random scene that allows it."""
    while True:
        scene = _source(category, rng) if source is None else source
        steps = _steps(category, scene, rng)
        if edit_split(scene, steps) == split:
            break
    target = scene
    for step in steps:
        target = step.apply(target)
    text = " and ".join(step.text for step in steps)
    return Request(category=category, text=text, target=target, source=scene, steps=steps)


def _source(category: str, rng: random.Random) -> Scene:
    """A face where the category needs one (and every other time where it allows one), else two or three shapes."""
    background = rng.choice(BACKGROUNDS)
    if category in ("expression", "hair") or (category in ("background", "two-step") and rng.random() < 1 / 3):
        face = Face(identity=rng.choice(IDENTITIES), expression=rng.choice(EXPRESSIONS), shift=rng.randrange(-1, 2))
        return Scene(background=background, face=face)
    count = rng.randrange(2, 4) if category in ("remove", "two-step") else rng.randrange(1, 4)
    kinds, cells = rng.sample(_PLAIN, count), rng.sample(range(4), count)
    things = (
        jitter(Thing(colour=colour, shape=shape), cell, rng) for (colour, shape), cell in zip(kinds, cells, strict=True)
    )
    return Scene(background=background, things=tuple(things))


def _steps(category: str, scene: Scene, rng: random.Random) -> tuple[Step, ...]:
    """One step, or two that do not touch the same thing, in random order."""
    if category != "two-step":
        return (_step(category, scene, scene.things, rng),)
    if scene.face is not None:
        return tuple(_step(kind, scene, (), rng) for kind in rng.sample(_FACE_STEPS, 2))
    first, second = rng.choice(("recolour", "remove", "add")), rng.choice(("recolour", "remove", "add", "background"))
    if first == second == "add":
        second = "background"
    one = _step(first, scene, scene.things, rng)
    untouched = tuple(thing for thing in scene.things if thing != one.thing)
    # Nothing that is there before or after the first step may be made a second time: the words would be ambiguous.
    crowded = replace(scene, things=scene.things + one.apply(scene).things)
    other = _step(second, crowded, untouched, rng)
    return (one, other) if rng.random() < 0.5 else (other, one)


def _step(kind: str, scene: Scene, things: tuple[Thing, ...], rng: random.Random) -> Step:
    """A random change of `scene`; if it changes a shape, one of `things`. Never makes two things look alike."""
    if kind == "background":
        return Step(kind="background", value=BACKGROUNDS[1 - BACKGROUNDS.index(scene.background)])
    if scene.face is not None:
        if kind == "hair":
            return Step(kind="hair", value=_other(HAIR, scene.face.identity.hair, rng))
        return Step(kind="expression", value=_other(EXPRESSIONS, scene.face.expression, rng))
    taken = {(thing.colour, thing.shape) for thing in scene.things}
    if kind == "add":
        colour, shape = rng.choice([plain for plain in _PLAIN if plain not in taken])
        free = sorted(set(range(4)) - {thing.cell for thing in scene.things})
        return Step(kind="add", thing=jitter(Thing(colour=colour, shape=shape), rng.choice(free), rng))
    thing = rng.choice(things)
    if kind == "remove":
        return Step(kind="remove", thing=thing)
    colours = [colour for colour in COLOURS if (colour, thing.shape) not in taken]
    if not colours:
        return Step(kind="remove", thing=thing)
    return Step(kind="recolour", thing=thing, value=rng.choice(colours))


def _other(values: tuple[str, ...], present: str, rng: random.Random) -> str:
    return rng.choice([value for value in values if value != present])
