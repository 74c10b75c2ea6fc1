"""A run folder with the real file formats and made-up, structured contents: what the report is tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from velatura.core.pictures import grid, save_png
from velatura.core.report import summarise

CATEGORIES = {"t2i": ("single", "pair", "relation", "count", "portrait"), "edit": ("recolor", "remove", "add", "hair")}
MODELS = {"t2i": ("base", "teacher_t2i", "student"), "edit": ("base", "teacher_edit", "student")}
GAIN = {"base": 0.0, "teacher_t2i": 0.12, "teacher_edit": 0.10, "student": 0.105}
KINDS = {
    "curate_t2i": "curate", "curate_edit": "curate", "teacher_t2i": "rl", "teacher_edit": "rl", "student": "distill",
    "compare": "evaluate", "export": "export",
}  # fmt: skip
COLOURS = {"red": (0.8, 0.15, 0.15), "green": (0.15, 0.6, 0.3), "blue": (0.2, 0.3, 0.8), "yellow": (0.95, 0.8, 0.2)}
SEEDS = 4


def make_run(folder: Path, *, prompts: int = 40, gain: float = 1.0, seed: int = 0) -> Path:
    """A finished run; `gain` scales what training achieved."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    stages = {name: {"stage": kind} for name, kind in KINDS.items()}
    recipe = {"seed": 0, "engine": {"kind": "local", "threads": 1}, "stages": stages}
    (folder / "recipe.yaml").write_text("# a comment with <angle brackets> & an ampersand\n" + yaml.safe_dump(recipe))
    _json(folder / "resolved.json", {
        "recipe": recipe,
        "plugins": [{"kind": "reward", "name": "alignment", "plugin": "rewards", "distribution": "velatura",
                     "version": "0.1.0"}],
        "environment": {"velatura": "0.1.0", "python": "3.11.9", "platform": "Linux-6.1-x86_64", "git": "74bbd09",
                        "torch": "2.13.0", "numpy": "2.4.6"},
    })  # fmt: skip
    for number, (name, kind) in enumerate(KINDS.items()):
        _json(folder / name / "manifest.json", {
            "stage": name, "kind": kind, "status": "finished", "seconds": 31.7 * (number + 1) % 170 + 4,
            "started": f"2026-11-22T05:{10 + 3 * number:02d}:00+00:00", "result": _result(name, kind),
            "inputs": {"option stage": "a3" * 32, "engine": "5f" * 32, "velatura": "0c" * 32},
        })  # fmt: skip
    for route in CATEGORIES:
        _curation(folder / f"curate_{route}", route, rng)
        _training(folder / f"teacher_{route}", [""], 60, rng)
    _training(folder / "student", ["t2i", "edit"], 60, rng)
    make_evaluation(folder / "compare", prompts=prompts, gain=gain, seed=seed)
    summarise(folder / "compare", "base", bootstrap=400, seed=0)
    return folder


def make_evaluation(folder: Path, *, prompts: int = 40, gain: float = 1.0, seed: int = 0) -> Path:
    """samples.parquet, images, sources and models.json of an evaluate stage."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {}
    for route, models in MODELS.items():
        own = [_prompt(route, i, rng) for i in range(prompts)]
        ease = rng.normal(0, 0.12, size=prompts)
        pictures = [[_picture(text, rng) for _ in range(SEEDS)] for _, text, _ in own]
        for model in models:
            rows, images = _rows(route, model, own, ease, gain, rng), []
            for name, values in rows.items():
                columns.setdefault(name, []).extend(values)
            for row, alignment in enumerate(rows["gold/alignment"]):
                clean = pictures[row // SEEDS][row % SEEDS]
                noise = rng.normal(0, 0.5 * (1 - alignment), clean.shape)
                images.append(((clean + noise).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))
            _npz(folder / "images" / model / f"{route}.npz", images=np.stack(images))
        if route == "edit":
            sources = [(_picture("blue", rng) * 255).astype(np.uint8).transpose(1, 2, 0) for _ in own]
            ids = np.array([prompt for prompt, _, _ in own])
            _npz(folder / "images" / "sources" / "edit.npz", images=np.stack(sources), prompt_ids=ids)
    pq.write_table(pa.table(columns), folder / "samples.parquet")
    teachers = {"t2i": "teacher_t2i", "edit": "teacher_edit"}
    _json(folder / "models.json", {
        "base": {"kind": "base", "guidance": "stage"}, "teacher_t2i": {"kind": "rl", "guidance": "stage"},
        "teacher_edit": {"kind": "rl", "guidance": "stage"},
        "student": {"kind": "distill", "guidance": 1.0, "teachers": teachers},
    })  # fmt: skip
    return folder


def _rows(route: str, model: str, own: list[Any], ease: Any, gain: float, rng: Any) -> dict[str, list[Any]]:
    """The table of one model on one route; category `count` gains nothing, identity concerns portraits only."""
    rows: dict[str, list[Any]] = {}
    for i, (prompt, text, category) in enumerate(own):
        lift = 0.0 if category == "count" else GAIN[model] * gain
        for j in range(SEEDS):
            quality = float(np.clip(0.6 + ease[i] + lift + rng.normal(0, 0.12), 0, 1))
            is_face = category in ("portrait", "hair")
            cells = {
                "model": model, "route": route, "category": category, "prompt_id": prompt, "text": text,
                "seed": 7919 * i + j,
                "gold/alignment": quality, "gold/strict": float(quality > 0.7),
                "gold/cleanliness": float(np.clip(0.9 + rng.normal(0, 0.03), 0, 1)),
                "gold/identity": float(np.clip(0.95 + rng.normal(0, 0.02), 0, 1)) if is_face else None,
                "gold/preservation": float(np.clip(0.8 + rng.normal(0, 0.05), 0, 1)) if route == "edit" else None,
                "reward/alignment": float(quality + rng.normal(0, 0.05) + lift / 2),
            }  # fmt: skip
            for name, value in cells.items():
                rows.setdefault(name, []).append(value)
    return rows


def _prompt(route: str, number: int, rng: Any) -> tuple[str, str, str]:
    category = CATEGORIES[route][number % len(CATEGORIES[route])]
    colour, other = rng.choice(list(COLOURS), 2, replace=False)
    text = {
        "single": f"a {colour} circle", "pair": f"a {colour} square and a {other} circle",
        "relation": f"a {colour} circle left of a {other} square", "count": f"three {colour} circles on white",
        "portrait": f"portrait of alice smiling on {colour}", "recolor": f"make the circle {colour}",
        "remove": f"remove the {colour} square", "add": f"add a {colour} circle", "hair": f"give her {colour} hair",
    }[category]  # fmt: skip
    return f"tinyworld/{route}/eval/{number:06d}", text, category


def _picture(text: str, rng: Any) -> Any:
    """3 24 24 with a disc in the colour that the text names first."""
    colour = next((rgb for name, rgb in COLOURS.items() if name in text), (0.5, 0.5, 0.5))
    image = np.full((3, 24, 24), 0.97)
    y, x = np.mgrid[:24, :24]
    cy, cx = rng.integers(8, 16, size=2)
    inside = (y - cy) ** 2 + (x - cx) ** 2 < 30
    for channel in range(3):
        image[channel][inside] = colour[channel]
    return image


def _curation(folder: Path, route: str, rng: Any) -> None:
    ranges = rng.gamma(3.0, 0.12, size=120)
    ranges[:6] = 0.0
    keep = ranges > 0.25
    own = [_prompt(route, i, rng) for i in range(120)]
    reasons = [
        f"kept: range {r:.4g}" if k else "range 0: every sample scores the same" if r == 0 else f"range {r:.4g} < 0.25"
        for k, r in zip(keep, ranges, strict=True)
    ]
    table = {
        "prompt_id": [p for p, _, _ in own], "text": [t for _, t, _ in own], "category": [c for _, _, c in own],
        "task": [route] * 120, "keep": keep.tolist(), "reason": reasons, "range": ranges.tolist(),
        "mean": rng.uniform(0.3, 0.9, 120).tolist(), "n_valid": [16] * 120,
        "reward/alignment/mean": rng.uniform(0.3, 0.9, 120).tolist(),
    }  # fmt: skip
    pq.write_table(pa.table(table), folder / "ledger.parquet")
    captions = {}
    for name in ("kept", "dropped"):
        rows = [[_noisy(own[i][1], rng) for _ in range(8)] for i in range(4)]
        save_png(folder / "pictures" / f"{name}.png", grid(rows, scale=3))
        captions[f"{name}.png"] = f"{name}: " + " · ".join(f"{own[i][1]} ({reasons[i]})" for i in range(4))
    _json(folder / "pictures" / "captions.json", captions)


def _training(folder: Path, labels: list[str], steps: int, rng: Any) -> None:
    folder.mkdir(exist_ok=True)
    lines = []
    for step in range(steps):
        progress = 1 - np.exp(-step / 20)
        row = {
            "step": step, "loss": 0.4 - 0.2 * progress + rng.normal(0, 0.02), "grad_norm": abs(rng.normal(0.6, 0.15)),
            "time/rollout_s": 1.1, "time/judge_s": 0.3, "time/update_s": 2.2, "time/step_s": 3.7, "lr": 1e-4,
        }  # fmt: skip
        if labels == [""]:
            reward = 0.9 + 0.3 * progress + rng.normal(0, 0.05)
            row |= {"reward/composite": reward, "reward/alignment/mean": reward * 0.6, "kl": 0.002 * progress,
                    "reward/aesthetics/mean": reward * 0.4, "reward/spread_within_group": 0.2 - 0.05 * progress,
                    "positive_share": 0.5, "advantage/std": 1.0}  # fmt: skip
        elif step % 10 == 0 or step == steps - 1:
            row |= {f"probe/{label}": 0.2 * (1 - 0.8 * progress) for label in labels}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    captions = {}
    for label in labels:
        for step in (0, 20, 40, 60):
            name = f"{label}-step-{step:06d}.png" if label else f"step-{step:06d}.png"
            rows = [[_noisy(colour, rng, 0.3 - step / 250) for _ in range(6)] for colour in COLOURS]
            save_png(folder / "pictures" / name, grid(rows, scale=3))
            captions[name] = f"after {step} steps: " + " · ".join(f"a {colour} circle" for colour in COLOURS)
    _json(folder / "pictures" / "captions.json", captions)


def _noisy(text: str, rng: Any, sd: float = 0.15) -> Any:
    return (_picture(text, rng) + rng.normal(0, sd, (3, 24, 24))).clip(0, 1)


def _result(name: str, kind: str) -> dict[str, Any]:
    if kind == "rl":
        return {
            "steps": 60,
            "guidance_scale": 2.0,
            "failures": {"alignment: failed": 3} if name == "teacher_t2i" else {},
        }
    if kind == "export":
        return {"folder": "runs/demo/export/model", "stage": "student", "guidance_scale": 1.0}
    return {"failures": 0} if kind == "curate" else {}


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _npz(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
