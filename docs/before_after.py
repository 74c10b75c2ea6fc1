"""Make the README's before/after picture from the evaluation of a run: the same prompts and seeds, base and student.

python docs/before_after.py runs/tinyworld docs/images/before-after.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from velatura.core.pictures import grid, save_png

SEEDS = 4
SHOWN = {
    "t2i": ("single", "pair", "relation", "count", "style", "portrait"),
    "edit": ("recolour", "remove", "two-step", "hair"),
}


def main(run: Path, out: Path) -> None:
    """One row a prompt, the first of its category: source (edits), base with four seeds, student with the same."""
    folder = run / "compare"
    table = pq.read_table(folder / "samples.parquet").to_pylist()
    rows, labels = [], []
    for route, categories in SHOWN.items():
        pictures = {model: _pictures(folder, table, model, route) for model in ("base", "student")}
        sources = _sources(folder, route)
        for category in categories:
            prompt = next(r for r in table if r["route"] == route and r["category"] == category)
            own = [pictures[model][prompt["prompt_id"]][:SEEDS] for model in ("base", "student")]
            source = sources.get(prompt["prompt_id"], np.full_like(own[0][0], 255))
            rows.append([source, *own[0], np.full_like(source, 255), *own[1]])
            labels.append(prompt["text"])
    columns = ["source", *["base"] + [""] * (SEEDS - 1), "", *["student"] + [""] * (SEEDS - 1)]
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(out, grid(rows, scale=3, row_labels=labels, column_labels=columns))


def _pictures(folder: Path, table: list[dict[str, Any]], model: str, route: str) -> dict[str, list[Any]]:
    """Prompt id -> pictures `3 H W`, in the order of the seeds."""
    images = np.load(folder / "images" / model / f"{route}.npz")["images"].transpose(0, 3, 1, 2)
    found: dict[str, list[Any]] = {}
    mine = [row for row in table if row["model"] == model and row["route"] == route]
    for row, image in zip(mine, images, strict=True):
        found.setdefault(row["prompt_id"], []).append(image)
    return found


def _sources(folder: Path, route: str) -> dict[str, Any]:
    path = folder / "images" / "sources" / f"{route}.npz"
    if not path.exists():
        return {}
    stored = np.load(path)
    return dict(zip(stored["prompt_ids"], stored["images"].transpose(0, 3, 1, 2), strict=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
