"""Ablations: variants of one recipe over several seeds, a figure, and a verdict with intervals."""
