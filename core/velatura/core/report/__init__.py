"""One self-contained page about a run, the numbers of an evaluation, and their table for the terminal."""

from velatura.core.report.page import build_report
from velatura.core.report.summary import summarise
from velatura.core.report.terminal import summary_table

__all__ = ["build_report", "summarise", "summary_table"]
