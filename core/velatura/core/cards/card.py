"""Reward cards as files: made, written, read, and compared with the reward that a recipe names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from velatura.core import __version__
from velatura.core.cards.criteria import Criteria, failures, judged, passes
from velatura.core.cards.identity import differences, digest_of
from velatura.core.cards.measures import Measuring, Options
from velatura.core.cards.ratings import Rated
from velatura.core.cards.scoring import Scoring
from velatura.core.checkpoint import write_text_atomic
from velatura.core.errors import RecipeError, VelaturaError
from velatura.core.served import Served
from velatura.core.types import Status

FORMAT = 1
"""Of `card.json`."""
CARD, PAGE = "card.json", "card.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The reward that a card is about."""

    served: Served
    identity: Mapping[str, str]
    """What its scores depend on, by name."""


def make_card(
    subject: Subject, rated: Rated, options: Options, criteria: Criteria, *, batch: int, tick: Callable[[int], None]
) -> dict[str, Any]:
    """Measure a reward beside ratings.

    Raises:
        VelaturaError: it has no score for any of the pictures.
    """
    served = subject.served
    scoring = Scoring(rated=rated, label=served.label, model=served.model, batch=batch, tick=tick)
    measuring = Measuring(scoring, options)
    measures = _measured(measuring)
    found = judged(measures, criteria)
    return {
        "format": FORMAT,
        "velatura": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "reward": {"label": served.label, "use": served.use, "summary": served.summary,
                   "dimension": served.model.dimension(), "scope": served.model.scope},
        "fingerprint": digest_of(subject.identity),
        "identity": dict(subject.identity),
        "data": _data(rated),
        "settings": {**_settings(options), "criteria": criteria.model_dump()},
        "measures": measures,
        "criteria": [each.plain() for each in found],
        "passed": passes(found),
        "holes": [row["name"] for row in measures["battery"] if row["verdict"] == "hole"],
    }  # fmt: skip


def _measured(measuring: Measuring) -> dict[str, Any]:
    """All measures, where there is anything to measure."""
    scoring = measuring.scoring
    groups = [(pair.first, pair.second) for pair in scoring.rated.pairs]
    groups += [] if groups else [(row,) for row in range(len(scoring.rated.pictures))]
    scoring.scores(groups)
    if not scoring.status[Status.OK]:
        why = next(iter(scoring.reasons), "it does not apply to any of the prompts")
        raise VelaturaError(
            f"reward '{scoring.label}' has no score for any of the {scoring.pictures} pictures of "
            f"{scoring.rated.path}: {why}"
        )
    return measuring.everything()


def _data(rated: Rated) -> dict[str, Any]:
    pictures = rated.pictures
    splits = [rated.split[cluster] for cluster in rated.split]
    return {
        "file": rated.path.name, "sha256": rated.digest, "lines": rated.lines, "pictures": len(pictures),
        "prompts": len({p.facts.key for p in pictures}), "pairs": len(rated.pairs), "raters": len(rated.raters),
        "clusters": len(rated.split), "calibration_clusters": splits.count("calibration"),
        "test_clusters": splits.count("test"), "left_out_lines": rated.left_out,
        "edits": any(p.facts.sources for p in pictures),
    }  # fmt: skip


def _settings(options: Options) -> dict[str, Any]:
    plain = asdict(options)
    return {**plain.pop("draws"), **plain, "slices": list(options.slices), "expect": dict(options.expect)}


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
        raise RecipeError(f"{at}: {file} is no reward card: {error}") from error
    if not isinstance(loaded, dict) or loaded.get("format") != FORMAT or "identity" not in loaded:
        raise RecipeError(f"{at}: {file} is no reward card that this version reads (format {FORMAT}); make it again: "
                          f"{COMMAND}")  # fmt: skip
    return loaded


COMMAND = "velatura reward-card RECIPE --reward NAME --ratings RATINGS.jsonl --out FOLDER"


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
