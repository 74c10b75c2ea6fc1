"""A reward card: a reward measured beside ratings, judged by the criteria."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from velatura.core import __version__
from velatura.core.cards.criteria import Criteria, judged, passes
from velatura.core.cards.file import FORMAT
from velatura.core.cards.identity import digest_of
from velatura.core.cards.measures import Measuring, Options
from velatura.core.cards.ratings import Rated
from velatura.core.cards.scoring import Group, Scoring
from velatura.core.errors import VelaturaError
from velatura.core.served import Served
from velatura.core.types import Status


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
    groups: list[Group] = [(pair.first, pair.second) for pair in scoring.rated.pairs]
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
