"""A kernel: one step of the sampler, as a distribution over the next state."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from velatura.api import Kernel, Options, Transition


class ChurnOptions(Options):
    """Options of `churn`."""

    eta: float = Field(0.5, gt=0, description="How much noise is drawn; towards 0 it becomes the Euler step.")


class Churn(Kernel[ChurnOptions]):
    """An Euler-Maruyama step of a stochastic sampler with the marginals of the flow.

    With h = t - t_next and score s = -(x + (1 - t) v) / t:
    x_{t_next} = x - h v + (eta^2 t / 2) s h + eta sqrt(t h) z, z standard normal.
    """

    name = "churn"
    stochastic = True

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Mean [B ...] and std [] of the state at t_next < t."""
        h = t - t_next
        drift = self.options.eta**2 / 2 * (x + (1 - t) * v)
        return Transition(mean=x - h * (v + drift), std=self.options.eta * (t * h).sqrt())
