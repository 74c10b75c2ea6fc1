"""Draw the source pictures of the shipped edit prompts: python docs/draw_sources.py [FOLDER]."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parents[1] / "recipes" / "prompts" / "sources"
SIDE, FINE = 512, 2
"""Sides in pixels, and how many times finer it is drawn."""
Paint = str | tuple[int, int, int]


class Canvas:
    """A square picture in units of 1/100 of its side."""

    def __init__(self, top: Paint, bottom: Paint) -> None:
        """A background that runs from one colour to another."""
        sides = (SIDE * FINE, SIDE * FINE)
        ramp = Image.linear_gradient("L").resize(sides)
        self.image = Image.composite(Image.new("RGB", sides, bottom), Image.new("RGB", sides, top), ramp)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x: float, y: float, x1: float, y1: float, fill: Paint, radius: float = 0) -> None:
        """A rectangle, with rounded corners."""
        self.draw.rounded_rectangle(self._scaled(x, y, x1, y1), self._scaled(radius)[0], fill)

    def disc(self, x: float, y: float, rx: float, fill: Paint, ry: float | None = None) -> None:
        """An ellipse around x, y."""
        ry = rx if ry is None else ry
        self.draw.ellipse(self._scaled(x - rx, y - ry, x + rx, y + ry), fill)

    def shape(self, *points: float, fill: Paint) -> None:
        """A polygon."""
        self.draw.polygon(self._scaled(*points), fill)

    def line(self, *points: float, fill: Paint, width: float = 1) -> None:
        """A line through points."""
        self.draw.line(self._scaled(*points), fill, round(self._scaled(width)[0]), joint="curve")

    def write(self, x: float, y: float, text: str, fill: Paint, size: float) -> None:
        """Text around x, y."""
        font = ImageFont.load_default(self._scaled(size)[0])
        self.draw.text(self._scaled(x, y), text, fill, font=font, anchor="mm", stroke_width=3, stroke_fill=fill)

    def _scaled(self, *numbers: float) -> list[float]:
        return [number * SIDE * FINE / 100 for number in numbers]


def house() -> Canvas:
    """A white house with a red door, a tree beside it."""
    c = Canvas("#7db9e8", "#dff1ff")
    c.box(0, 70, 100, 100, "#7fae5a")
    c.box(26, 42, 70, 80, "#f4efe6")
    c.shape(20, 44, 48, 22, 76, 44, fill="#9c4a3c")
    c.box(44, 58, 53, 80, "#b3262a")
    c.disc(51.4, 69, 0.7, "#f2d060")
    for x in (31, 58):
        c.box(x, 50, x + 8, 59, "#6d8fa8")
        c.line(x + 4, 50, x + 4, 59, fill="#ffffff", width=0.7)
    c.box(84, 58, 87, 80, "#6b4a2f")
    c.disc(85.5, 49, 11, "#4e7f3d", 14)
    return c


def harbour() -> Canvas:
    """A sailing boat before a low sun."""
    c = Canvas("#f6a65b", "#fbe3b5")
    c.disc(70, 38, 8, "#fff3c9")
    c.box(0, 55, 100, 100, "#2f6f8f")
    for k in range(9):
        c.line(62 - k, 58 + 4 * k, 79 + k, 58 + 4 * k, fill="#f3c98a", width=0.5)
    c.shape(24, 62, 60, 62, 54, 71, 30, 71, fill="#7a3b26")
    c.line(42, 62, 42, 24, fill="#4a2d1c", width=0.9)
    c.shape(43, 26, 43, 59, 60, 59, fill="#fdfaf2")
    c.shape(41, 30, 41, 59, 28, 59, fill="#e9e1d0")
    return c


def table() -> Canvas:
    """A blue bowl with three red apples on a wooden table."""
    c = Canvas("#cfc3b2", "#e8ded0")
    c.box(0, 62, 100, 100, "#a9713f")
    for y in (70, 80, 91):
        c.line(0, y, 100, y, fill="#8f5c31", width=0.5)
    for x, y in ((40, 50), (59, 50), (50, 44)):
        c.disc(x, y, 9, "#c22f2b")
        c.disc(x - 3, y - 3, 2.2, "#e36b5c")
        c.line(x, y - 8, x + 1.5, y - 12, fill="#4d3420", width=0.8)
    c.draw.pieslice(c._scaled(24, 28, 76, 80), 0, 180, "#2f5d9b")
    c.box(40, 78, 60, 82, "#274d82", 1)
    return c


def sign() -> Canvas:
    """A sign that reads OPEN on a brick wall."""
    c = Canvas("#9d5a44", "#8a4c39")
    for row in range(13):
        for column in range(-1, 9):
            x = column * 13 + (row % 2) * 6.5
            c.box(x, row * 8, x + 12.2, row * 8 + 7.2, "#b26a50" if (row * 5 + column * 3) % 4 else "#a45d46", 0.5)
    c.line(30, 12, 30, 36, fill="#3b3b3b", width=0.8)
    c.line(70, 12, 70, 36, fill="#3b3b3b", width=0.8)
    c.box(18, 36, 82, 66, "#1f4d3a", 3)
    c.box(20, 38, 80, 64, "#f3ead3", 2)
    c.write(50, 50.5, "OPEN", "#1f4d3a", 19)
    return c


def balloons() -> Canvas:
    """Two hot-air balloons over green hills."""
    c = Canvas("#5fa8e0", "#e3f3fd")
    c.disc(20, 104, 52, "#6b9a4b", 30)
    c.disc(84, 108, 56, "#557f3d", 32)
    for x, y, r, one, two in ((34, 32, 15, "#d8433b", "#f4d35e"), (72, 46, 9, "#3d5a98", "#f5efe2")):
        c.disc(x, y, r, one, r * 1.12)
        c.disc(x, y, r * 0.5, two, r * 1.12)
        c.disc(x, y, r * 0.14, one, r * 1.12)
        for side in (-1, 1):
            c.line(x + side * r * 0.3, y + r, x + side * r * 0.18, y + r * 1.5, fill="#5c4630", width=0.4)
        c.box(x - r * 0.22, y + r * 1.5, x + r * 0.22, y + r * 1.8, "#7b5a36", 0.5)
    return c


def room() -> Canvas:
    """A green armchair, a floor lamp and a window."""
    c = Canvas("#e9e2d5", "#e2d8c6")
    c.box(0, 76, 100, 100, "#b58a5e")
    c.box(10, 14, 40, 50, "#ffffff")
    c.box(12, 16, 38, 48, "#a8d3ef")
    c.line(25, 16, 25, 48, fill="#ffffff", width=1.4)
    c.line(12, 32, 38, 32, fill="#ffffff", width=1.4)
    c.box(40, 46, 72, 80, "#3f7a5b", 4)
    c.box(36, 60, 44, 84, "#356a4e", 3)
    c.box(68, 60, 76, 84, "#356a4e", 3)
    c.box(44, 64, 68, 74, "#4c8d6b", 2)
    c.line(86, 34, 86, 86, fill="#3a332b", width=1.1)
    c.disc(86, 87, 6, "#3a332b", 1.5)
    c.shape(80, 34, 92, 34, 96, 48, 76, 48, fill="#f2c869")
    return c


def snow() -> Canvas:
    """A snowman in a field of snow, firs behind it, at night."""
    c = Canvas("#0f1c3c", "#34508a")
    for k in range(40):
        c.disc(k * 37 % 100, k * 53 % 58, 0.35, "#f4f6ff")
    c.box(0, 66, 100, 100, "#e9f1fb")
    for x, h in ((12, 30), (27, 22), (86, 34)):
        for k in range(3):
            y = 68 - h + k * h / 3.6
            c.shape(x, y, x - 4 - 2 * k, y + h / 2.4, x + 4 + 2 * k, y + h / 2.4, fill="#1f4a3d")
    for y, r in ((78, 14), (58, 10), (43, 7)):
        c.disc(56, y, r, "#ffffff")
    for x in (53.5, 58.5):
        c.disc(x, 41.5, 0.9, "#20242c")
    c.shape(56, 43.5, 56, 45.5, 64, 45.2, fill="#e4802e")
    c.box(49, 34, 63, 36, "#22262f")
    c.box(51.5, 25, 60.5, 35, "#22262f")
    for y in (55, 60, 65):
        c.disc(56, y, 0.9, "#20242c")
    return c


def city() -> Canvas:
    """A skyline at dusk, some windows lit."""
    c = Canvas("#3a2f63", "#f09a72")
    towers = ((4, 46, 16), (18, 30, 14), (34, 52, 12), (47, 22, 15), (64, 40, 13), (79, 34, 17))
    for n, (x, top, width) in enumerate(towers):
        c.box(x, top, x + width, 90, "#231f3a" if n % 2 else "#2d2849")
        for i in range(int(width // 3)):
            for j in range(int((86 - top) // 5)):
                lit = (i * 7 + j * 11 + n * 5) % 3 == 0
                c.box(x + 1.2 + 3 * i, top + 2 + 5 * j, x + 2.8 + 3 * i, top + 4.5 + 5 * j,
                      "#ffd98a" if lit else "#3d3760")  # fmt: skip
    c.box(0, 88, 100, 100, "#17152a")
    return c


def lighthouse() -> Canvas:
    """A red and white lighthouse on a cliff."""
    c = Canvas("#6fb1d9", "#eef7fb")
    c.box(0, 72, 100, 100, "#2c6c8c")
    c.shape(0, 66, 52, 62, 68, 80, 74, 100, 0, 100, fill="#8a7a66")
    for k in range(5):
        inset = 0.9 * k
        c.box(27 + inset, 56 - 8 * k, 43 - inset, 64.3 - 8 * k, "#c9382f" if k % 2 else "#fbfaf6")
    c.box(28, 21, 42, 24, "#3c3f46")
    c.box(31, 14, 39, 21, "#ffe9a6")
    c.shape(29, 14, 41, 14, 35, 8, fill="#c9382f")
    return c


def cups() -> Canvas:
    """Three cups on a shelf: white, yellow and black."""
    c = Canvas("#b9cdc6", "#a8beb6")
    for x, paint in ((22, "#f6f3ec"), (50, "#e6b93a"), (78, "#2a2a2e")):
        c.disc(x + 9, 54, 5, paint)
        c.disc(x + 9, 54, 3, "#b0c5be")
        c.box(x - 9, 44, x + 9, 66, paint, 2.5)
        c.disc(x, 44.5, 8.5, "#55514b", 1.6)
    c.box(0, 66, 100, 71, "#7c5333")
    c.box(0, 71, 100, 73, "#5f3f27")
    return c


def car() -> Canvas:
    """A yellow car on a country road."""
    c = Canvas("#8fc6ea", "#e9f5fc")
    c.disc(20, 66, 40, "#86ab63", 18)
    c.disc(88, 68, 44, "#739a52", 20)
    c.box(0, 66, 100, 100, "#5b5d63")
    for x in range(0, 100, 22):
        c.box(x, 88, x + 12, 89.6, "#f1eee4")
    c.shape(32, 58, 40, 45, 62, 45, 71, 58, fill="#d7a71b")
    c.shape(36, 57, 42, 47.5, 50, 47.5, 50, 57, fill="#bfe0ee")
    c.shape(52, 57, 52, 47.5, 60.5, 47.5, 66, 57, fill="#bfe0ee")
    c.box(22, 57, 80, 71, "#efc02c", 3)
    for x in (35, 67):
        c.disc(x, 71, 6, "#202226")
        c.disc(x, 71, 2.6, "#b9bdc4")
    return c


def poster() -> Canvas:
    """A poster with a teapot and the word TEA."""
    c = Canvas("#d9d4ca", "#c9c3b7")
    c.box(18, 8, 82, 92, "#fdf6e3")
    c.box(21, 11, 79, 89, "#e8c9b0")
    c.disc(50, 46, 17, "#8a3f5d", 14)
    c.disc(50, 32, 8, "#73324c", 2.5)
    c.disc(50, 28.5, 2, "#73324c")
    c.shape(64, 46, 77, 35, 75, 34, 63, 40, fill="#8a3f5d")
    c.draw.arc(c._scaled(25, 36, 41, 56), 70, 290, "#8a3f5d", 22)
    c.write(50, 75, "TEA", "#53233a", 17)
    return c


DRAWN: tuple[Callable[[], Canvas], ...] = (
    house, harbour, table, sign, balloons, room, snow, city, lighthouse, cups, car, poster,
)  # fmt: skip


def main(folder: Path = FOLDER) -> None:
    """Write all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in DRAWN:
        picture = draw().image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.quantize(256, dither=Image.Dither.NONE).save(folder / f"{draw.__name__}.png", optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
