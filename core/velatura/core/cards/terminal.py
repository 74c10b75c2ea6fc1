"""A card on the screen: what decides, then what was seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

STYLE = {
    "passed": "green", "failed": "red", "not measured": "yellow", "not applicable": "dim",
    "right": "green", "hole": "red", "unclear": "yellow", "told": "dim", "no score": "yellow",
}  # fmt: skip


def tables(card: Mapping[str, Any]) -> Iterator[RenderableType]:
    """One after the other."""
    reward = card["reward"]
    yield Text(f"{reward['label']} ({reward['use']}, {reward['dimension']}), fingerprint {card['fingerprint']}")
    yield _criteria(card)
    yield _agreement(card["measures"])
    if card["measures"]["battery"]:
        yield _battery(card["measures"]["battery"])
    word = Text("passed", style="bold green") if card["passed"] else Text("not passed", style="bold red")
    yield Text("verdict  ").append(word)


def shown(estimate: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`0.731 [0.701, 0.760]`; empty for what is not known."""
    if not estimate or estimate.get("value") is None:
        return "-"
    value = f"{estimate['value']:.{digits}f}"
    if estimate["low"] is None:
        return value
    return f"{value} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def agreement_rows(measures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, value with its interval, what it was measured on)."""
    rows: list[tuple[str, str, str]] = []
    for name, found in measures["pairs"].items():
        on = f"{found['half']['n']} pairs, {found['half']['clusters']} clusters, {name}"
        rows += [
            ("accuracy, ties one half", shown(found["half"]), on),
            ("accuracy, ties wrong", shown(found["strict"]), on),
            ("ties of the reward", shown(found["ties"]), on),
            ("one rater against the others", shown(found["ceiling"]), on),
        ]
    ties = measures["ties"]
    if ties:
        rows.append(("accuracy with ties of people", shown(ties["accuracy"]), f"ties within {ties['eps']:.3g}"))
    rows += _rating_rows(measures["ratings"])
    rows.append(("selection", shown(measures["selection"]), "share of the gain by the best choice"))
    calibration = measures["calibration"]
    if "ece" in calibration:
        rows.append(("calibration error", shown(calibration["ece"]), f"T = {calibration['temperature']:.3g}"))
        rows.append(("Brier score", shown(calibration["brier"]), "0.25 is a coin's"))
    return rows + _people_rows(measures["people"]) + _noise_rows(measures)


def _rating_rows(ratings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    names = {"spearman": "Spearman", "kendall": "Kendall tau-b", "pearson": "Pearson"}
    return [
        (f"{names[name]}, {where}", shown(estimate), f"{estimate['n']} {unit}")
        for part, where, unit in (("overall", "all pictures", "pictures"), ("within", "within a prompt", "prompts"))
        for name, estimate in ratings.get(part, {}).items()
    ]


def _people_rows(people: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    on = f"{people['raters']} raters"
    said = (("choices", "Krippendorff's alpha, choices"), ("ratings", "Krippendorff's alpha, ratings"),
            ("correlation", "one rater's Spearman with the others"))  # fmt: skip
    return [(what, shown(people[name]), on) for name, what in said if name in people]


def _noise_rows(measures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows, retest, position, cost = [], measures["retest"], measures["position"], measures["cost"]
    if retest:
        icc = "-" if retest["icc"] is None else f"{retest['icc']:.3f}"
        rows.append(("test-retest ICC(2,1)", icc, f"{retest['pictures']} pictures; {retest['kind']}"))
        rows.append(("noise of a score", "-" if retest["sigma"] is None else f"{retest['sigma']:.3g}", "sigma"))
    if position:
        rows.append(("same in both orders", shown(position["consistency"]), "pairs"))
        rows.append(("worth of the first place", shown(position["bias"]), "0 is none"))
    failed = "-" if cost["failed"] is None else f"{cost['failed']:.2%}"
    rows.append(("failures", failed, f"{cost['pictures']} pictures"))
    if cost["p50"] is not None:
        rows.append(("seconds of a call, p50 / p95", f"{cost['p50']:.3g} / {cost['p95']:.3g}",
                     f"about {cost['batch']} pictures a call"))  # fmt: skip
    if cost["prompt_tokens"] is not None:
        tokens = f"{cost['prompt_tokens']:.0f} + {cost['completion_tokens']:.0f}"
        rows.append(("tokens of a picture", tokens, "read + written"))
    return rows


def _criteria(card: Mapping[str, Any]) -> Table:
    table = _table("Criteria", "criterion", "wanted", "found", "", "why")
    for row in card["criteria"]:
        table.add_row(row["name"], row["wanted"], row["found"], Text(row["outcome"], style=STYLE[row["outcome"]]),
                      Text(row["why"], style="dim"))  # fmt: skip
    return table


def _agreement(measures: Mapping[str, Any]) -> Table:
    table = _table("Measures, with 95 % intervals over clusters", "measure", "value", "on")
    for what, value, on in agreement_rows(measures):
        table.add_row(what, value, Text(on, style="dim"))
    return table


def _battery(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("Perturbations: change of the score in standard deviations", "picture", "expected", "change", "rose",
                   "")  # fmt: skip
    for row in rows:
        table.add_row(f"{row['name']}: {row['about']}", row["expected"], shown(row["change"], 2),
                      f"{row['raised']:.0%}", Text(row["verdict"], style=STYLE[row["verdict"]]))  # fmt: skip
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table
