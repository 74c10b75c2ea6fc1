"""Reward cards as files: written, read, and compared with the reward that a recipe names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from velatura.core.cards.criteria import failures
from velatura.core.cards.identity import differences
from velatura.core.checkpoint import write_text_atomic
from velatura.core.errors import RecipeError

FORMAT = 1
"""Of `card.json`."""
CARD, PAGE = "card.json", "card.html"
COMMAND = "velatura reward-card RECIPE --reward NAME --ratings RATINGS.jsonl --out FOLDER"


def write_card(folder: Path, card: Mapping[str, Any], page: str) -> None:
    """`card.json` and `card.html` in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / CARD, json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text_atomic(folder / PAGE, page)


def read_card(path: Path, at: str) -> dict[str, Any]:
    """A card from its file, or from its folder.

    Raises:
        RecipeError: there is none, or it is none that this version reads.
    """
    file = path / CARD if path.is_dir() else path
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{at}: there is no reward card at {file} ({error.strerror}); make one: {COMMAND}") from error
    except ValueError as error:
        raise RecipeError(f"{at}: {file} is no reward card ({error}); make one: {COMMAND}") from error
    if not isinstance(loaded, dict) or loaded.get("format") != FORMAT or "identity" not in loaded:
        raise RecipeError(f"{at}: {file} is no reward card that this version reads (format {FORMAT}); make it again: "
                          f"{COMMAND}")  # fmt: skip
    return loaded


def require_same(card: Mapping[str, Any], identity: Mapping[str, str], at: str) -> None:
    """The card is about this reward.

    Raises:
        RecipeError: it is about another one, with what differs.
    """
    changed = differences(card["identity"], identity)
    if changed:
        raise RecipeError(f"{at}: the card is about another reward: {'; '.join(changed)}. Make a card of this one: "
                          f"{COMMAND}")  # fmt: skip


def why_not(card: Mapping[str, Any]) -> str:
    """The criteria that a card does not meet; empty when it passes."""
    return "" if card["passed"] else "; ".join(failures(card["criteria"])) or "it does not pass"
