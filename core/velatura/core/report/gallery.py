"""Pictures of an evaluation side by side: the same prompts and seeds under every model."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image, UnidentifiedImageError

from velatura.core.pictures import Picture, enlarge, png_bytes
from velatura.core.report.samples import Evaluation, Measured

SHOWN_SEEDS = 4
SHOWN_PROMPTS = 12
EXTREMES = 4
"""Prompts shown among the best, and as many among the worst."""
TILE = 144
"""Small pictures are enlarged to at least so many pixels, without blur."""
LARGEST = 384
"""Larger pictures are shrunk to this side and stored as JPEG."""
WIDEST = 1600
"""Widest grid that is stored as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some pictures of one prompt by one model."""

    uri: str
    alt: str
    score: float | None = None
    """Mean of the primary metric over all seeds of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt."""

    text: str
    category: str
    source: Tile | None
    tiles: Mapping[str, Tile]
    """Model -> its pictures."""
    gain: float | None = None
    """Of the model in question over the baseline, on the primary metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wall:
    """The stored pictures of one route, ready to be cut into rows."""

    route: str
    metric: str
    """The primary metric."""
    models: Mapping[str, Measured]
    images: Mapping[str, Picture]
    """Model -> uint8 [n H W 3]."""
    sources: Mapping[str, Picture]
    """Prompt -> uint8 [H W 3]."""

    def row(self, prompt: str, gain: float | None = None) -> Row:
        """The pictures of one prompt under every model."""
        shown = {model: rows for model in self.images if (rows := self.models[model].rows_by_prompt().get(prompt))}
        model, rows = next(iter(shown.items()))
        first = self.models[model]
        source = self.sources.get(prompt)
        return Row(
            text=first.texts[rows[0]],
            category=first.categories[rows[0]],
            source=None if source is None else Tile(uri=mosaic([source]), alt="source"),
            tiles={name: self._tile(name, own) for name, own in shown.items()},
            gain=gain,
        )

    def _tile(self, model: str, rows: Sequence[int]) -> Tile:
        scores = self.models[model].metrics[self.metric][list(rows)]
        known = scores[np.isfinite(scores)]
        return Tile(
            uri=mosaic([self.images[model][row] for row in rows[:SHOWN_SEEDS]]),
            alt=f"{model}: {self.models[model].texts[rows[0]]}",
            score=float(known.mean()) if len(known) else None,
        )

    def means(self, model: str) -> dict[str, float]:
        """Prompt -> mean of the primary metric over seeds."""
        measured, means = self.models[model], {}
        values = measured.metrics[self.metric]
        for prompt, rows in measured.rows_by_prompt().items():
            known = values[rows][np.isfinite(values[rows])]
            if len(known):
                means[prompt] = float(known.mean())
        return means


def open_wall(folder: Path, evaluation: Evaluation, route: str, metric: str, notes: list[str]) -> Wall | None:
    """The stored pictures of a route; models without any are left out with a note."""
    models, images = evaluation.routes[route], {}
    for model, measured in models.items():
        path = folder / "images" / model / f"{route}.npz"
        stored = _load(path, notes).get("images")
        if stored is None:
            continue
        if len(stored) == len(measured.prompt_ids):
            images[model] = stored
        else:
            notes.append(f"{path.name} of {model} holds {len(stored)} pictures for {len(measured.prompt_ids)} rows.")
    if not images:
        return None
    sources = _sources(folder / "images" / "sources" / f"{route}.npz", notes)
    return Wall(route=route, metric=metric, models=models, images=images, sources=sources)


def balanced(wall: Wall, seed: int = 0) -> list[Row]:
    """Prompts drawn at random within categories, the categories in turn; never by score."""
    measured = wall.models[next(iter(wall.images))]
    by_category: dict[str, list[str]] = {}
    for prompt, rows in measured.rows_by_prompt().items():
        by_category.setdefault(measured.categories[rows[0]], []).append(prompt)
    rng = np.random.default_rng(seed)
    queues = {name: [own[i] for i in rng.permutation(len(own))] for name, own in by_category.items()}
    turns = max(len(own) for own in queues.values())
    in_turn = [(name, own[i]) for i in range(turns) for name, own in queues.items() if i < len(own)]
    place = {name: i for i, name in enumerate(queues)}
    chosen = sorted(in_turn[:SHOWN_PROMPTS], key=lambda item: place[item[0]])
    return [wall.row(prompt) for _, prompt in chosen]


def extremes(wall: Wall, model: str, baseline: str) -> tuple[list[Row], list[Row]]:
    """Prompts on which `model` gained most, and lost most, over the baseline; only true gains and losses."""
    own, base = wall.means(model), wall.means(baseline)
    gains = {prompt: own[prompt] - base[prompt] for prompt in own if prompt in base}
    order = sorted(gains, key=lambda prompt: gains[prompt])
    worst = [wall.row(prompt, gains[prompt]) for prompt in order[:EXTREMES] if gains[prompt] < 0]
    best = [wall.row(prompt, gains[prompt]) for prompt in order[::-1][:EXTREMES] if gains[prompt] > 0]
    return best, worst


def mosaic(images: Sequence[Picture]) -> str:
    """Up to four pictures in a square, as a data URI."""
    side = max(images[0].shape[:2])
    tiles = [enlarge(image, -(-TILE // side)) if side < TILE else _shrunk(image) for image in images]
    height, width = tiles[0].shape[:2]
    columns = 2 if len(tiles) > 1 else 1
    gap = max(2, width // 36)
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + gap) - gap), (0, 0, 0, 0))
    for i, tile in enumerate(tiles):
        canvas.paste(Image.fromarray(tile), (i % columns * (width + gap), i // columns * (height + gap)))
    return data_uri(canvas, lossless=side < TILE)


def data_uri(image: Image.Image, *, lossless: bool) -> str:
    """The picture itself in place of an address."""
    if lossless:
        return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def file_uri(path: Path, notes: list[str]) -> str | None:
    """A picture file as a data URI; a broken one is left out with a note."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.width <= WIDEST:
                return data_uri(image, lossless=True)
            smaller = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError) as error:
        notes.append(f"{path.parent.parent.name}/pictures/{path.name} cannot be read: {error}.")
        return None
    return data_uri(smaller, lossless=False)


def _shrunk(image: Picture) -> Picture:
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _load(path: Path, notes: list[str]) -> dict[str, Picture]:
    """Arrays of an npz; empty, with a note, when it is missing or broken."""
    if not path.exists():
        notes.append(f"{'/'.join(path.parts[-3:])} is missing: no pictures of it are shown.")
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, BadZipFile) as error:
        notes.append(f"{'/'.join(path.parts[-3:])} cannot be read: {error}.")
        return {}


def _sources(path: Path, notes: list[str]) -> dict[str, Picture]:
    """Prompt -> source picture, from `images` with `prompt_ids`, or from one array per prompt."""
    if not path.exists():
        return {}
    stored = _load(path, notes)
    if "prompt_ids" in stored:
        ids = [str(name) for name in stored["prompt_ids"]]
        return dict(zip(ids, stored["images"], strict=False))
    return dict(stored)
