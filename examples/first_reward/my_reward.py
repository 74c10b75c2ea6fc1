"""A reward in one file."""

import torch

from velatura.api import NoOptions, RewardModel, Scores, hookimpl


class Redness(RewardModel[NoOptions]):
    """Share of red in the light of a picture, in [0, 1]."""

    name = "redness"

    def score(self, samples):
        """One score per picture, higher is better."""
        return Scores.of(torch.stack([s.image[0].sum() / s.image.sum().clamp_min(1e-6) for s in samples]))


@hookimpl
def velatura_reward():
    """What this plugin offers."""
    return [Redness]
