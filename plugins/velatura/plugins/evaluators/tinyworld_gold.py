"""The evaluator `tinyworld-gold`: what the verifier of the embedded world says, names included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from velatura.api import Evaluator, NoOptions, Sample, VelaturaError
from velatura.plugins.tinyworld.scenes import request_of
from velatura.plugins.tinyworld.verify import JUDGE, Verdict, flaw

METRICS = ("alignment", "strict", "cleanliness", "identity", "preservation")


class TinyWorldGold(Evaluator[NoOptions]):
    """Exact measurements, each in [0, 1], higher is better; None where they do not apply.

    `alignment`: what was asked for, partial credit, a name's identity and an edit's side effects included.
    `strict`: 1 if everything is right. `cleanliness`: share of pixels close to a colour of the world.
    `identity`: is it the person the prompt names (text-to-image) or the source shows (edits of faces).
    `preservation`: edits only, exp(-MSE / .02) over the pixels the edit should have left alone.
    """

    name = "tinyworld-gold"

    def evaluate(self, samples: Sequence[Sample]) -> Mapping[str, Sequence[float | None]]:
        """Five metrics of B values; samples of other tasks get None throughout."""
        rows = [(row, request_of(sample.prompt)) for row, sample in enumerate(samples)]
        asked = [(row, request) for row, request in rows if request is not None]
        for row, _ in asked:
            if reason := flaw(samples[row].image):
                raise VelaturaError(f"Picture for prompt {samples[row].prompt.id!r} cannot be measured. {reason}")
        verdicts = JUDGE.verdicts([samples[row].image for row, _ in asked], [request for _, request in asked])
        columns: dict[str, list[float | None]] = {metric: [None] * len(samples) for metric in METRICS}
        for (row, _), verdict in zip(asked, verdicts, strict=True):
            for metric, value in _measurements(verdict).items():
                columns[metric][row] = value
        return columns


def _measurements(verdict: Verdict) -> Mapping[str, float | None]:
    return {
        "alignment": verdict.soft,
        "strict": float(verdict.strict),
        "cleanliness": verdict.clean,
        "identity": verdict.identity,
        "preservation": verdict.preservation,
    }
