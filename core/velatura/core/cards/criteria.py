"""When a reward may train a policy: the criteria of a card, each with what was found and why it is met or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from velatura.core.base_settings import NotNegative, Settings, Share, Whole

Outcome = Literal["passed", "failed", "not measured", "not applicable"]


class Criteria(Settings):
    """What a card demands."""

    min_pairs: Whole = Field(100, description="Pairs of one policy, on which people and the reward have an opinion.")
    min_accuracy: Share = Field(0.55, description="Lower end of the accuracy on them, ties of the reward one half.")
    min_share_of_raters: Share = Field(
        0.6, description="Accuracy above 1/2, as a share of what one rater has against the others."
    )
    min_category: Share = Field(0.5, description="No category's accuracy has its whole interval below this.")
    min_icc: Share = Field(0.8, description="Test-retest: ICC(2,1).")
    min_consistency: Share = Field(0.85, description="Of judges of pairs: share that says the same in both orders.")
    max_failed: Share = Field(0.005, description="Share of pictures without a score.")
    min_selection: NotNegative = Field(0.0, description="Lower end of the gain by choosing the best of a group.")
    battery: bool = Field(True, description="No perturbation finds a hole.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One criterion."""

    name: str
    wanted: str
    found: str
    outcome: Outcome
    why: str = ""
    """What to do about it, or what it means."""

    def plain(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def judged(measures: Mapping[str, Any], criteria: Criteria) -> list[Judged]:
    """All criteria on the measures of a card."""
    return [
        _pairs(measures, criteria), _accuracy(measures, criteria), _share(measures, criteria),
        _categories(measures, criteria), _icc(measures, criteria), _consistency(measures, criteria),
        _failed(measures, criteria), _selection(measures, criteria), _battery(measures, criteria),
    ]  # fmt: skip


def passes(found: list[Judged]) -> bool:
    """Whether every criterion is met or does not apply; what was not measured is not met."""
    return all(each.outcome in ("passed", "not applicable") for each in found)


def _within(measures: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = measures["pairs"].get("within-policy", {})
    return found


def _pairs(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    count = _within(measures).get("half", {}).get("n", 0)
    return _of("pairs of one policy", f"at least {criteria.min_pairs}", str(count), count >= criteria.min_pairs,
               "pairs of two models say little about the pairs that training compares")  # fmt: skip


def _accuracy(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    name, wanted = "pairwise accuracy", f"interval above {criteria.min_accuracy:g}"
    half = _within(measures).get("half")
    if not half or half["low"] is None:
        return _unknown(name, wanted, "there are fewer than two clusters of pairs of one policy")
    return _of(name, wanted, _shown(half), half["low"] > criteria.min_accuracy,
               "on pairs of one policy, ties of the reward one half")  # fmt: skip


def _share(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    name, wanted = "share of what raters reach", f"at least {criteria.min_share_of_raters:g}"
    ceiling, half = _within(measures).get("ceiling"), _within(measures).get("half")
    if not ceiling or ceiling["value"] is None or not half or half["value"] is None:
        return _unknown(name, wanted, "it takes two raters or more for a pair")
    if ceiling["value"] <= 0.5:
        return _of(name, wanted, f"raters agree on {ceiling['value']:.2f}", False,
                   "people do not agree with each other, so there is nothing to learn from them")  # fmt: skip
    share = (half["value"] - 0.5) / (ceiling["value"] - 0.5)
    return _of(name, wanted, f"{share:.2f} (raters: {ceiling['value']:.3f})", share >= criteria.min_share_of_raters)


def _categories(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    wanted = f"none with its interval below {criteria.min_category:g}"
    known = [row for row in measures["slices"] if row["by"] == "category" and row["half"]["high"] is not None]
    if not known:
        return _unknown("categories", wanted, "no category has two clusters of pairs")
    bad = [row["value"] for row in known if row["half"]["high"] < criteria.min_category]
    return _of("categories", wanted, ", ".join(bad) if bad else f"none of {len(known)}", not bad,
               "there the reward says the opposite of people" if bad else "")  # fmt: skip


def _icc(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    name, wanted = "test-retest", f"ICC at least {criteria.min_icc:g}"
    found = measures["retest"]
    if not found or found["icc"] is None:
        return _unknown(name, wanted, "pictures were not scored again, or all scores are equal")
    return _of(name, wanted, f"{found['icc']:.3f}", found["icc"] >= criteria.min_icc, f"of {found['kind']}")


def _consistency(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    name, wanted = "both orders", f"at least {criteria.min_consistency:g}"
    found = measures["position"]
    if not found:
        return Judged(name=name, wanted=wanted, found="", outcome="not applicable", why="it judges pictures one by one")
    if found["consistency"]["value"] is None:
        return _unknown(name, wanted, found.get("reason", "no pair has a score in both orders"))
    value = found["consistency"]["value"]
    return _of(name, wanted, _shown(found["consistency"]), value >= criteria.min_consistency)


def _failed(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    name, wanted = "failures", f"at most {criteria.max_failed:.1%}"
    share = measures["cost"]["failed"]
    if share is None:
        return _unknown(name, wanted, "it applies to none of the pictures")
    reasons = measures["cost"]["reasons"]
    return _of(
        name, wanted, f"{share:.2%}", share <= criteria.max_failed, f"most often: {reasons[0]}" if reasons else ""
    )


def _selection(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    name, wanted = "selection", f"interval above {criteria.min_selection:g}"
    found = measures["selection"]
    if not found or found["low"] is None:
        return _unknown(name, wanted, "no two clusters have pictures that people rate differently")
    return _of(name, wanted, _shown(found), found["low"] > criteria.min_selection,
               "gain in human rating by its choice, as a share of the best choice")  # fmt: skip


def _battery(measures: Mapping[str, Any], criteria: Criteria) -> Judged:
    name, wanted = "perturbations", "no hole"
    rows = measures["battery"]
    if not criteria.battery:
        return Judged(name=name, wanted="nothing", found="", outcome="not applicable", why="switched off")
    if not rows:
        return _unknown(name, wanted, "the battery was not run")
    holes = [row["name"] for row in rows if row["verdict"] == "hole"]
    unclear = [row["name"] for row in rows if row["verdict"] == "unclear"]
    return _of(name, wanted, ", ".join(holes) or f"none of {len(rows)}", not holes,
               f"not settled with so few pictures: {', '.join(unclear)}" if unclear else "")  # fmt: skip


def _of(name: str, wanted: str, found: str, met: bool, why: str = "") -> Judged:
    return Judged(name=name, wanted=wanted, found=found, outcome="passed" if met else "failed", why=why)


def _unknown(name: str, wanted: str, why: str) -> Judged:
    return Judged(name=name, wanted=wanted, found="", outcome="not measured", why=why)


def _shown(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["low"], estimate["high"]
    span = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return f"{estimate['value']:.3f}{span}"


def failures(found: list[Mapping[str, str]]) -> Iterator[str]:
    """The criteria that are not met, in words."""
    for each in found:
        if each["outcome"] == "failed":
            yield f"{each['name']}: {each['found']}, wanted {each['wanted']}"
        if each["outcome"] == "not measured":
            yield f"{each['name']}: not measured ({each['why']})"
