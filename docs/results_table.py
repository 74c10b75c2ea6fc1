"""Print the results table of the README from the evaluations of several runs (one per seed).

python docs/results_table.py runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = (
    ("t2i", "teacher_t2i", ("gold/alignment", "gold/strict", "gold/cleanliness", "gold/identity")),
    ("t2i", "student", ("gold/alignment", "gold/strict", "gold/cleanliness", "gold/identity")),
    ("edit", "teacher_edit", ("gold/alignment", "gold/strict", "gold/cleanliness", "gold/identity")),
    ("edit", "student", ("gold/alignment", "gold/strict", "gold/cleanliness", "gold/identity")),
)


def main(folders: list[str]) -> None:
    """One line per route, model and metric; one column per run."""
    runs = [json.loads((Path(folder) / "compare" / "summary.json").read_text()) for folder in folders]
    seeds = [json.loads((Path(folder) / "resolved.json").read_text())["recipe"]["seed"] for folder in folders]
    print("| task | model | metric | base | " + " | ".join(f"change, seed {seed}" for seed in seeds) + " |")
    print("|---|---|---|---|" + "---|" * len(runs))
    for route, model, metrics in ROWS:
        for metric in metrics:
            cells = [_cell(run, route, model, metric) for run in runs]
            base = runs[0]["routes"][route]["models"]["base"][metric]["overall"]["mean"]
            print(f"| {route} | {model} | {metric.removeprefix('gold/')} | {base:.3f} | " + " | ".join(cells) + " |")
    for route in ("t2i", "edit"):
        shares = [_share(run, route) for run in runs]
        print(f"| {route} | student | share of its teacher's alignment gain | | " + " | ".join(shares) + " |")


def _cell(run: dict[str, Any], route: str, model: str, metric: str) -> str:
    found = run["routes"][route]["models"][model][metric]["overall"]
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _share(run: dict[str, Any], route: str) -> str:
    found = run["routes"][route]["retained"]["student"]["metrics"]["gold/alignment"]
    if found["low"] is None:
        return f"{found['ratio']:.0%}"
    return f"{found['ratio']:.0%} [{found['low']:.0%}, {found['high']:.0%}]"


if __name__ == "__main__":
    main(sys.argv[1:])
