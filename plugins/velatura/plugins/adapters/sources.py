"""What is said of prompts whose source images a family cannot use."""

from __future__ import annotations

import textwrap

from velatura.api import Prompt, VelaturaError

SHOWN = 40
"""Letters of a prompt's text in a message: ids are often made by a machine."""


def called(prompt: Prompt) -> str:
    """A prompt as messages name it: `Prompt 'a1' (make it blue)`."""
    text = textwrap.shorten(prompt.text, SHOWN, placeholder="...")
    return f"Prompt {prompt.id!r} ({text})" if text else f"Prompt {prompt.id!r}"


def check_count(prompt: Prompt, adapter: str, most: int | None) -> None:
    """Whether `adapter`, which takes at most `most` source images (None: any number), can draw `prompt`.

    Raises:
        VelaturaError: an edit has no source image, or there are too many.
    """
    found = len(prompt.sources)
    if prompt.task == "edit" and not found:
        raise VelaturaError(f"{called(prompt)} is an edit without a source image. Give it one in `sources`.")
    if found and most == 0:
        raise VelaturaError(
            f"{called(prompt)} has {found} source image(s), but '{adapter}' only draws from text. Take a model that "
            "edits, such as 'qwen-image-21', or leave `sources` out."
        )
    if most is not None and found > most:
        raise VelaturaError(f"{called(prompt)} has {found} source images; '{adapter}' takes {most}.")
