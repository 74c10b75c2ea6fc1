"""Rated pictures on disk: the micro-batches of a judge that is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from velatura.core.kept_batches import about_prompt
from velatura.core.ratings import Rated
from velatura.core.types import Prompt, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPictures:
    """A micro-batch of a judge: pictures with what raters said of them."""

    number: int
    """Of the micro-batch among those of its rank."""
    rated: Sequence[Rated]
    rank: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The pictures, and the sources of edits."""
        found = {}
        for i, row in enumerate(self.rated):
            found[f"{i}/image"] = row.sample.image
            found |= {f"{i}/source/{s}": one for s, one in enumerate(row.sample.prompt.sources)}
        return found

    def about(self) -> dict[str, Any]:
        """Prompts and ratings."""
        return {
            "number": self.number,
            "pictures": [
                {
                    "prompt": about_prompt(row.sample.prompt), "sources": len(row.sample.prompt.sources),
                    "seed": row.sample.seed, "ratings": list(row.ratings), "rationale": row.rationale,
                    "truth": row.truth,
                }
                for row in self.rated
            ],
        }  # fmt: skip


def pictures_of(rank: int, about: Mapping[str, Any], own: Mapping[str, Tensor]) -> KeptPictures:
    """The micro-batch that was kept as `about` and `own`."""
    rated = []
    for i, one in enumerate(about["pictures"]):
        sources = tuple(own[f"{i}/source/{s}"] for s in range(one["sources"]))
        sample = Sample(prompt=Prompt(**one["prompt"], sources=sources), image=own[f"{i}/image"], seed=one["seed"])
        ratings = tuple(one["ratings"])
        rated.append(Rated(sample=sample, ratings=ratings, rationale=one["rationale"], truth=one["truth"]))
    return KeptPictures(number=about["number"], rated=rated, rank=rank)
