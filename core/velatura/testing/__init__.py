"""Checks that a plugin author runs on their own components."""

from velatura.testing.adapters import StockSampler, difference_to_pipeline

__all__ = ["StockSampler", "difference_to_pipeline"]
