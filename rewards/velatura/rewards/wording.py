"""The words that a picture is asked to show, and how well the words in it agree with them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from velatura.api import Prompt, VelaturaError

QUOTED = re.compile(r'"([^"]*)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|『([^』]+)』')
"""Straight and curly double quotes, guillemets, corner brackets. Single quotes are apostrophes more often."""
TAKEN = "\0"
"""Stands where words were found, so that nothing is matched across the gap."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Counts of letters, white space left out."""

    asked: int
    """Letters asked for."""
    wrong: int
    """Letters to insert, delete or replace before every text asked for is there; at most `asked`."""
    extra: int
    """Letters found that belong to no text asked for."""

    def score(self, weight: float) -> float:
        """(asked - wrong) / (asked + weight extra), in [0, 1]; 0 where nothing was asked for."""
        return (self.asked - self.wrong) / (self.asked + weight * self.extra) if self.asked else 0.0


def quoted(text: str) -> tuple[str, ...]:
    """What stands in double quotes, in order."""
    return tuple(found for groups in QUOTED.findall(text) if (found := "".join(groups)))


def listed(prompt: Prompt, field: str) -> tuple[str, ...] | None:
    """The texts that `prompt.metadata` names under `field`; None where it has no such field.

    Raises:
        VelaturaError: the field holds something else than a string or a list of strings.
    """
    if field not in prompt.metadata:
        return None
    value = prompt.metadata[field]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise VelaturaError(
            f"Prompt {prompt.id!r}: its metadata field {field!r} holds {value!r}. 'ocr' reads there what the picture "
            'should say: a string, or a list of strings, like "metadata": {"' + field + '": ["OPEN", "24 hours"]}.'
        )
    return tuple(texts)


def plain(text: str, match_case: bool) -> str:
    """`text` in compatible forms (NFKC) without white space; in lower case unless `match_case`."""
    folded = unicodedata.normalize("NFKC", text)
    return "".join((folded if match_case else folded.casefold()).split())


def compare(asked: Sequence[str], found: Sequence[str], match_case: bool = False) -> Agreement:
    """Look for each text asked for in all that was found, read as one line; the longest first.

    Each takes the stretch with the least edit distance, the longest of several. What no text takes is extra.
    """
    line = "".join(plain(text, match_case) for text in found)
    texts = sorted((plain(text, match_case) for text in asked), key=len, reverse=True)
    wrong = 0
    for text in texts:
        distance, start, stop = nearest(text, line)
        wrong += distance
        line = line[:start] + TAKEN + line[stop:]
    return Agreement(asked=sum(map(len, texts)), wrong=wrong, extra=len(line.replace(TAKEN, "")))


def nearest(text: str, line: str) -> tuple[int, int, int]:
    """Edit distance to the nearest stretch of `line`, and where that starts and stops (Sellers 1980).

    Row i of the table holds, for every end j, the distance of the first i letters to the best stretch that ends there,
    and where it starts; a stretch may be empty, so the distance is at most the length of `text`.
    """
    row = [(0, j) for j in range(len(line) + 1)]
    for i, letter in enumerate(text, start=1):
        below = [(i, 0)]
        for j, other in enumerate(line, start=1):
            if other == TAKEN:
                below.append((i, j))
                continue
            (across, from_across), (left, from_left), (up, from_up) = row[j - 1], below[j - 1], row[j]
            below.append(min((across + (letter != other), from_across), (left + 1, from_left), (up + 1, from_up)))
        row = below
    distance, _, start, stop = min((cost, start - stop, start, stop) for stop, (cost, start) in enumerate(row))
    return distance, start, stop
