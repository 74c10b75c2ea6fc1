"""An evaluator: measures pictures, and is never trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from velatura.api import Evaluator, NoOptions, Sample


class Contrast(Evaluator[NoOptions]):
    """Standard deviation of the brightness of a picture, in [0, 0.5]."""

    name = "contrast"

    def evaluate(self, samples: Sequence[Sample]) -> Mapping[str, Sequence[float | None]]:
        """One value per sample, None where a metric does not apply. Means and intervals are formed elsewhere."""
        return {"contrast": [float(sample.image.mean(0).std(correction=0)) for sample in samples]}
