"""Contracts, registry, recipes, loop and engines. Imports no implementation of any component."""

__version__ = "0.1.0"
