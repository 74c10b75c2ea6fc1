"""The table of `velatura plugins check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from velatura.testing import Outcome

OK, FAILED = 0, 1


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> int:
    """A line for each component, then what failed and what could not be tried, with reasons; the exit status."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("kind", "component", "passed", "failed", "not checked"):
        table.add_column(heading, justify="left" if heading in ("kind", "component") else "right")
    for (kind, component), own in groupby(outcomes, key=lambda o: (o.check.kind, o.check.component)):
        count = Counter(outcome.status for outcome in own)
        numbers = [str(count[status] or "") for status in ("passed", "failed", "not checked")]
        table.add_row(kind or "plugin", Text(component), *numbers)
    console.print(table)
    for (status, component, reason), same in groupby(outcomes, key=lambda o: (o.status, o.check.component, o.reason)):
        if status != "passed":
            names = ", ".join(outcome.check.name for outcome in same)
            console.print(Text(f"{status}: {component}, {names}\n    {reason}"), soft_wrap=True)
    total = Counter(outcome.status for outcome in outcomes)
    said = [f"{total[status]} {status}" for status in ("passed", "failed", "not checked") if total[status]]
    console.print(", ".join(said))
    return FAILED if total["failed"] else OK
