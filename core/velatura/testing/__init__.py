"""Checks that a plugin author runs on their own components. Fixtures are in `velatura.testing.fixtures`."""

from velatura.testing.adapters import StockSampler, difference_to_pipeline
from velatura.testing.conformance import Outcome, outcome_of, parametrize_with_checks, plugin_checks
from velatura.testing.kit import Check, CheckFailure, NotChecked, Trial
from velatura.testing.samples import make_prompts, make_report, make_samples

__all__ = [
    "Check",
    "CheckFailure",
    "NotChecked",
    "Outcome",
    "StockSampler",
    "Trial",
    "difference_to_pipeline",
    "make_prompts",
    "make_report",
    "make_samples",
    "outcome_of",
    "parametrize_with_checks",
    "plugin_checks",
]
