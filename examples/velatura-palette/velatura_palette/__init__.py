"""Colours that a picture should have, and colours that it has."""

from velatura.api import hookimpl


@hookimpl
def velatura_reward():
    """Imported when a recipe names it."""
    return ["keeps-to = velatura_palette.reward:KeepsTo"]


@hookimpl
def velatura_evaluator():
    """Imported when a recipe names it."""
    return ["colour = velatura_palette.evaluator:Colour"]
