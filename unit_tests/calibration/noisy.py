"""Rewards of a picture's brightness, with noise that is drawn anew from each seed that a judge is given."""

from pathlib import Path

import torch

from velatura.api import Options, RewardModel, Scores, Status, hookimpl

ECHOES = Path(__file__).with_name("echoes")
"""While there is such a file, `echo` says what `brightness` says: as if the policy had changed."""


class BrightnessOptions(Options):
    """How noisy, which way, and for which prompts not."""

    noise: float = 0.0
    sign: float = 1.0
    fails: float = 0.0


class Brightness(RewardModel[BrightnessOptions]):
    """sign x mean of all pixels + noise."""

    name = "brightness"

    def setup(self, context):
        """The seed decides the noise."""
        self._seed = context.seed

    def score(self, samples):
        """[B]."""
        values, status = [], []
        for sample in samples:
            draw = torch.Generator().manual_seed((self._seed * 1000003 + sample.seed) % 2**63)
            noise, luck = torch.randn((), generator=draw), torch.rand((), generator=draw)
            values.append(self.options.sign * sample.image.mean() + self.options.noise * noise)
            status.append(Status.FAILED if luck < self.options.fails else Status.OK)
        return Scores(values=torch.stack(values).float(), status=tuple(status), reasons=("unlucky",) * len(status))


class Echo(Brightness):
    """Noise, and once it echoes brightness and a little noise."""

    name = "echo"

    def score(self, samples):
        """[B]."""
        own = super().score(samples)
        draws = [torch.randn((), generator=torch.Generator().manual_seed(sample.seed % 2**63)) for sample in samples]
        noise = 0.01 * torch.stack(draws)
        return Scores.of((own.values if ECHOES.exists() else 0) + noise)


@hookimpl
def velatura_reward():
    """What this file offers."""
    return [Brightness, Echo]
