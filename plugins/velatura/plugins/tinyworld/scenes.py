"""What the world contains: shapes on a 2 x 2 grid, or one face, on a plain background."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from velatura.api import Prompt

COLOURS = ("red", "blue", "green", "yellow")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ("white", "black")
EXPRESSIONS = ("smiling", "sad", "neutral")
SKINS = ("light", "tan", "dark")
HAIR = ("brown", "yellow", "orange", "pink")
EYES = ("blue", "black")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS: Mapping[int, str] = {2: "two", 3: "three", 4: "four"}

METADATA_KEY = "tinyworld"
"""Where a prompt's `Request` lies in `Prompt.metadata`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One shape in one cell of the grid."""

    colour: str
    shape: str
    outlined: bool = False
    cell: int = 0
    """0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    down: int = 0
    """-1, 0 or 1 pixels from the middle of the cell."""
    right: int = 0
    """-1, 0 or 1 pixels from the middle of the cell."""

    @property
    def noun(self) -> str:
        """`red circle`, `outlined red circle`."""
        return f"outlined {self.colour} {self.shape}" if self.outlined else f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What makes a person: everything of a face but its expression."""

    skin: str
    hair: str
    long: bool
    """Long hair."""
    eyes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """One portrait."""

    identity: Identity
    expression: str
    shift: int = 0
    """-1, 0 or 1 pixels to the right of the middle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture, exactly: shapes or a face."""

    background: str
    things: tuple[Thing, ...] = ()
    face: Face | None = None


StepKind = Literal["recolour", "remove", "add", "background", "expression", "hair"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change that an edit instruction asks for."""

    kind: StepKind
    value: str = ""
    """The new colour, background, expression or hair colour."""
    thing: Thing | None = None
    """The shape concerned, as it is in the source (in the target, for `add`)."""

    @property
    def text(self) -> str:
        """The instruction in words."""
        noun = self.thing.noun if self.thing else ""
        return {
            "recolour": f"make the {noun} {self.value}",
            "remove": f"remove the {noun}",
            "add": f"add a {noun}",
            "background": f"make the background {self.value}",
            "expression": f"make the person {self.value}",
            "hair": f"give the person {self.value} hair",
        }[self.kind]

    def apply(self, scene: Scene) -> Scene:
        """The scene after this change; everything else stays."""
        if self.kind == "background":
            return replace(scene, background=self.value)
        if scene.face is not None:
            if self.kind == "expression":
                return replace(scene, face=replace(scene.face, expression=self.value))
            return replace(scene, face=replace(scene.face, identity=replace(scene.face.identity, hair=self.value)))
        return replace(scene, things=self._things(scene.things))

    def _things(self, things: tuple[Thing, ...]) -> tuple[Thing, ...]:
        thing = self.thing
        if thing is None:
            raise ValueError(f"'{self.kind}' needs the shape it concerns.")
        if self.kind == "add":
            return (*things, thing)
        if self.kind == "remove":
            return tuple(other for other in things if other != thing)
        return tuple(replace(other, colour=self.value) if other == thing else other for other in things)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a prompt asks for, in full: all that verifier and rewards need to know."""

    category: str
    text: str
    target: Scene
    """A picture that satisfies the request (one of many for text-to-image; where things lie is free there)."""
    relation: str | None = None
    """How the first thing lies to the second."""
    name: str | None = None
    """Whose portrait; None for anonymous faces and shapes."""
    source: Scene | None = None
    """What an edit starts from."""
    steps: tuple[Step, ...] = ()
    """What an edit changes."""


NAMES: Mapping[str, Identity] = {
    "alice": Identity(skin="light", hair="yellow", long=True, eyes="blue"),
    "bob": Identity(skin="tan", hair="brown", long=False, eyes="black"),
    "carol": Identity(skin="dark", hair="orange", long=True, eyes="black"),
    "dave": Identity(skin="light", hair="orange", long=False, eyes="black"),
    "erin": Identity(skin="tan", hair="pink", long=True, eyes="blue"),
    "frank": Identity(skin="dark", hair="yellow", long=False, eyes="blue"),
}
"""The world's common knowledge: no prompt says what they look like."""

IDENTITIES: tuple[Identity, ...] = tuple(
    Identity(skin=skin, hair=hair, long=long, eyes=eyes)
    for skin in SKINS
    for hair in HAIR
    for long in (False, True)
    for eyes in EYES
)
"""All 48 people."""


def request_of(prompt: Prompt) -> Request | None:
    """The request of a prompt of this world, None for any other prompt."""
    request = prompt.metadata.get(METADATA_KEY)
    return request if isinstance(request, Request) else None
