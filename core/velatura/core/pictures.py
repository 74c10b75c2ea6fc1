"""Pictures for people: grids of small samples, enlarged without blur, as PNG files or bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from velatura.core.errors import VelaturaError

if TYPE_CHECKING:
    from torch import Tensor

PAPER = (250, 247, 242)
"""Background between the pictures."""
INK = (74, 70, 64)
"""Colour of labels."""
GAP = 4
"""Pixels between neighbours, after enlarging."""
TEXT = 12
"""Height of the letters of a label."""

LARGEST, ENLARGED = 256, 3
"""Pixels of the longer side of a picture in an overview, and how many times tiny ones are enlarged."""

Picture = NDArray[np.uint8]


def to_pixels(image: Tensor | NDArray[np.generic]) -> Picture:
    """uint8 `H W 3` of one picture `3 H W`; floats are in [0, 1], uint8 in 0..255. What is not finite is drawn grey.

    Raises:
        ValueError: the shape is another one.
    """
    array = np.asarray(image.detach().cpu().float() if hasattr(image, "detach") else image)
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"a picture is 3 H W, not {' '.join(map(str, array.shape))}")
    if array.dtype != np.uint8:
        finite = np.nan_to_num(array.astype(np.float64), nan=0.5, posinf=1.0, neginf=0.0)
        array = (finite.clip(0.0, 1.0) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def enlarge(pixels: Picture, scale: int) -> Picture:
    """Every pixel becomes a square of `scale` x `scale`."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def grid(
    rows: Sequence[Sequence[Tensor | NDArray[np.generic]]],
    *,
    scale: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """One picture of all, row by row, each enlarged `scale` times; rows may differ in length.

    Row labels stand left of their row, column labels above their column; both are cut where they would not fit.
    """
    tiles = [[enlarge(to_pixels(image), scale) for image in row] for row in rows]
    flat = [tile for row in tiles for tile in row]
    if not flat:
        raise ValueError("a grid needs at least one picture")
    height, width = max(t.shape[0] for t in flat), max(t.shape[1] for t in flat)
    font = ImageFont.load_default(TEXT)
    left = GAP + max((int(font.getlength(label)) + 2 * GAP for label in row_labels), default=0)
    top = GAP + (TEXT + 2 * GAP if column_labels else 0)
    columns = max(len(row) for row in tiles)
    canvas = Image.new("RGB", (left + columns * (width + GAP), top + len(tiles) * (height + GAP)), PAPER)
    for r, row in enumerate(tiles):
        for c, tile in enumerate(row):
            canvas.paste(Image.fromarray(tile), (left + c * (width + GAP), top + r * (height + GAP)))
    draw = ImageDraw.Draw(canvas)
    for r, label in enumerate(row_labels[: len(tiles)]):
        y = top + r * (height + GAP) + height // 2
        draw.text((GAP, y), label, fill=INK, font=font, anchor="lm")
    for c, label in enumerate(column_labels[:columns]):
        draw.text((left + c * (width + GAP), GAP), _fitting(label, width, font), fill=INK, font=font)
    return canvas


def overview(rows: Sequence[Sequence[Tensor | NDArray[np.generic]]]) -> Image.Image:
    """A grid of pictures of any size: tiny ones enlarged, large ones shrunk to `LARGEST`: it can be looked at."""
    return grid([[_fitted(to_pixels(image)).transpose(2, 0, 1) for image in row] for row in rows], scale=1)


def _fitted(pixels: Picture) -> Picture:
    longest = max(pixels.shape[:2])
    if longest * ENLARGED <= LARGEST:
        return enlarge(pixels, ENLARGED)
    picture = Image.fromarray(pixels)
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def png_bytes(image: Image.Image | Picture) -> bytes:
    """The picture as a PNG file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=6)  # `optimize` is 15 times slower and saves 3 %
    return buffer.getvalue()


def save_png(path: Path, image: Image.Image | Picture) -> None:
    """Write a PNG so that a reader sees the old file or the new one, never half of it. Makes the folder."""
    write_bytes_atomic(path, png_bytes(image))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a file under another name, then put it in its place. Makes the folder.

    Raises:
        VelaturaError: the file system refuses, most often because it is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise VelaturaError(
            f"cannot write {path} ({len(content)} bytes): {error}. Make room or choose another folder; what was there "
            f"before is intact."
        ) from error


def _fitting(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "…") > width:
        label = label[:-1]
    return label + "…"
