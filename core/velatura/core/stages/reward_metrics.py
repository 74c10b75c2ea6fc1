"""How often rewards fail, category by category: in the metrics of a step, and over a whole stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor

from velatura.core.types import RewardReport, Status

ASKED, RATE = "asked", "failure_rate"
Table = dict[str, dict[str, dict[str, int]]]
"""Reward -> category -> `asked` and `failed`."""


def failure_metrics(report: RewardReport) -> dict[str, float]:
    """`reward/NAME/failure_rate/CATEGORY`, and how many pictures it is of; N/A does not count as asked."""
    found: dict[str, float] = {}
    for name, categories in counted([report]).items():
        for category, count in categories.items():
            found[f"reward/{name}/{ASKED}/{category}"] = float(count["asked"])
            found[f"reward/{name}/{RATE}/{category}"] = count["failed"] / count["asked"]
    return found


def failed_in(status: Tensor) -> int:
    """How many of these statuses are of scores that were asked for and not given."""
    return int(((status != int(Status.OK)) & (status != int(Status.NOT_APPLICABLE))).sum())


def counted(reports: Iterable[RewardReport]) -> Table:
    """How many scores were asked for and how many failed or were refused."""
    table: Table = {name: {} for report in reports for name in report.names}
    for report in reports:
        categories = [report.prompts[int(row)].category for row in report.group]
        for r, name in enumerate(report.names):
            for category, status in zip(categories, report.status[:, r].tolist(), strict=True):
                if status != int(Status.NOT_APPLICABLE):
                    count = table[name].setdefault(category, {"asked": 0, "failed": 0})
                    count["asked"] += 1
                    count["failed"] += int(status != int(Status.OK))
    return table


def counted_in(rows: Iterable[Mapping[str, float]]) -> Table:
    """The same from a stage's log, interruptions included."""
    table: defaultdict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for row in rows:
        for key, asked in row.items():
            name, mark, category = key.removeprefix("reward/").partition(f"/{ASKED}/")
            if not mark or not key.startswith("reward/"):
                continue
            count = table[name].setdefault(category, {"asked": 0, "failed": 0})
            count["asked"] += int(asked)
            count["failed"] += round(asked * row.get(f"reward/{name}/{RATE}/{category}", 0.0))
    return dict(table)
