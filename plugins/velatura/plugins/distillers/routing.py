"""Which teacher answers for a prompt: what distillers share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from velatura.api import Options, Prompt


class RouteOptions(Options):
    """Options of every distiller that chooses among several teachers."""

    route: Literal["task", "category"] = Field(
        "task", description="The teacher of a prompt is the one named like its task, or like its category."
    )


def routed(options: RouteOptions, prompt: Prompt) -> str:
    """The prompt's task, or its category."""
    return prompt.task if options.route == "task" else prompt.category
