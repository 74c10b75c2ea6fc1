"""Solver steps that draw noise, so that a policy has a likelihood.

Flow-SDE and dance-SDE are Euler steps of one stochastic equation with the marginals of the flow,

    dx = [v + sigma_t^2 / (2 t) (x + (1 - t) v)] dt + sigma_t dw,    dt < 0,

with different sigma_t; x + (1 - t) v is the noise that x_t is made of, as v has it. CPS mixes the clean picture and the
noise that v implies with fresh noise, so that both keep their exact size. In all of them the mean is affine in v, and
without noise all of them are the Euler step of `ode`. Noise is drawn where the timesteps of an rl or distill stage say
so; pictures that nothing is learned from (curation, evaluation, pictures of progress) are the ODE's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Kernel, Options, Transition

TINY = 1e-12
"""Least t and 1 - t that are divided by: only a grid that starts and ends in the same place gets here."""


class FlowSdeOptions(Options):
    """Options of `flow-sde`."""

    a: float = Field(0.7, gt=0, le=10, description="Noise level: sigma_t = a sqrt(t / (1 - t)).")


class DanceSdeOptions(Options):
    """Options of `dance-sde`."""

    eta: float = Field(0.3, gt=0, le=10, description="Noise level: sigma_t = eta at all times.")


class CpsOptions(Options):
    """Options of `cps`."""

    eta: float = Field(
        0.8, gt=0, lt=1, description="Share of the noise that is drawn afresh, as an angle: sigma = s sin(eta pi / 2)."
    )
    likelihood: Literal["gaussian", "released"] = Field(
        "gaussian",
        description="`gaussian`: the log-density of the step; `released`: -mean (x - mu)^2 as in the released code, "
        "whose ratios, and so clip ranges, mean something else at every step.",
    )


class FlowSde(Kernel[FlowSdeOptions]):
    """The stochastic step of Flow-GRPO (arXiv:2505.05470).

    mu = x (1 + g dt) + v (1 + g (1 - t)) dt with g = sigma_t^2 / (2 t),   std = sigma_t sqrt(-dt),
    sigma_t = a sqrt(t / (1 - t)), so that g = a^2 / (2 (1 - t)). At t = 1, where sigma has its pole, 1 - t is
    that of the end of the step, as in the released code. std > 0 on every step, so the last one leaves noise in the
    picture.
    """

    name = "flow-sde"
    stochastic = True

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Mean [B ...] and std of x_{t_next}; times [] or shaped to broadcast against x."""
        away = (1 - torch.where(t < 1, t, t_next)).clamp_min(TINY)
        half = self.options.a**2 / (2 * away)
        return _sde(v, x, t, t_next, half, sigma=self.options.a * (t / away).sqrt())


class DanceSde(Kernel[DanceSdeOptions]):
    """The stochastic step of DanceGRPO (arXiv:2505.07818): the same equation with constant sigma.

    mu = x + v dt + eta^2 / 2 (x - (1 - t) x_0-estimate) / t^2 dt,   x_0-estimate = x - t v,   std = eta sqrt(-dt).
    The released scripts leave the last step out of training.
    """

    name = "dance-sde"
    stochastic = True

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Mean [B ...] and std of x_{t_next}; times [] or shaped to broadcast against x."""
        half = self.options.eta**2 / (2 * t.clamp_min(TINY))
        return _sde(v, x, t, t_next, half, sigma=torch.full_like(t, self.options.eta))


class Cps(Kernel[CpsOptions]):
    """The coefficient-preserving step of Flow-CPS (arXiv:2509.05952).

    To s = t_next: mu = (1 - s) x_0-estimate + sqrt(s^2 - sigma^2) x_1-estimate,   std = sigma = s sin(eta pi / 2),
    x_0-estimate = x - t v, x_1-estimate = x + (1 - t) v. The signal keeps its coefficient 1 - s and the noise its
    variance s^2 where v is that of one picture, so that pictures are as clean as those of the ODE. Where v is a mean
    over several it does not keep the marginals of the flow, and loses more spread the more steps there are. The step
    to s = 0 draws nothing and has no likelihood.
    """

    name = "cps"
    stochastic = True
    keeps_marginals = False

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Mean [B ...] and std of x_{t_next}; times [] or shaped to broadcast against x."""
        angle = self.options.eta * math.pi / 2
        v = v.to(x.dtype)
        mean = (1 - t_next) * (x - t * v) + t_next * math.cos(angle) * (x + (1 - t) * v)
        return Transition(mean=mean, std=t_next * math.sin(angle))

    def log_prob(self, x: Tensor, transition: Transition) -> Tensor:
        """[B] as the options say: the density, or what the released code takes for it."""
        if self.options.likelihood == "gaussian":
            return super().log_prob(x, transition)
        return -(x - transition.mean).square().flatten(1).mean(1)


def _sde(v: Tensor, x: Tensor, t: Tensor, t_next: Tensor, half: Tensor, *, sigma: Tensor) -> Transition:
    """x + [v + half (x + (1 - t) v)] dt, with half = sigma^2 / (2 t); std sigma sqrt(-dt)."""
    dt, v = t_next - t, v.to(x.dtype)
    return Transition(mean=x + (v + half * (x + (1 - t) * v)) * dt, std=sigma * (-dt).sqrt())
