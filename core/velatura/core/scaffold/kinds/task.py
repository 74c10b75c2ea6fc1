"""A task: where prompts come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from velatura.api import Options, Prompt, Task

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
THINGS = ("circle", "square", "triangle")


class ColoursOptions(Options):
    """Options of `colours`."""

    held_out: Literal["circle", "square", "triangle"] = Field(
        "triangle", description="What only the prompts of split `eval` ask for."
    )


class Colours(Task[ColoursOptions]):
    """Coloured shapes, one of which training never sees."""

    name = "colours"

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """All of a split, always in this order; an id names one prompt of a split, whatever its text."""
        things = [thing for thing in THINGS if (thing == self.options.held_out) == (split == "eval")]
        return [
            Prompt(id=f"{split}/{colour}-{thing}", text=f"a {colour} {thing}", task="t2i", category=thing)
            for thing in things
            for colour in COLOURS
        ]
