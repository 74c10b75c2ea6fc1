"""What is added to an objective to hold the policy: distances to other policies, and a bound on its size.

They look at no reward, and go with objectives on re-noised samples as with those on visited states. A recipe adds them
with `plus`, each with a weight. Distances are means over latent dimensions, so weights hold for pictures of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Loss, NoOptions, Options, Points, PolicyObjective, Requirements, Role
from velatura.plugins.objectives.ratio import step_divergence
from velatura.plugins.objectives.velocity_kl import (
    average,
    latent_mean,
    norm_ratio,
    velocity_kl,
    weighted_sum,
    widened,
)

NOTHING = 1e-12
"""Mean square below which a velocity is taken for 0."""


def _needs(role: Role, *, contrast: bool = True) -> Requirements:
    return Requirements(points="any", roles=frozenset({Role.CURRENT, role}), advantage=False, contrast=contrast)


class VelocityKL(PolicyObjective[NoOptions]):
    """Stay near the policy that the stage started from, measured in velocities.

    L_n = mean (v - v_ref)^2. Of two flows with the same noise, the KL divergence of a step is a factor of time and step
    size times this; the factor is left out (DiffusionNFT, arXiv:2509.16117; AWM, arXiv:2509.25050), or put back by the
    stage's step_weight `kl`. The objectives' own option `kl` is the same.
    """

    name = "velocity-kl"
    requires = _needs(Role.REFERENCE)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The distance to REFERENCE at N points."""
        return _distance(points, velocity[Role.CURRENT], velocity[Role.REFERENCE])


class KernelKLOptions(Options):
    """Options of `kernel-kl`."""

    kl_convention: Literal["paper", "flow_grpo_code"] = Field(
        "paper",
        description="`paper`: mean (mu - mu_ref)^2 / (2 s^2), s the standard deviation of the step; `flow_grpo_code`: "
        "that times the step size, as released, so that published coefficients mean what they did there.",
    )


class KernelKL(PolicyObjective[KernelKLOptions]):
    """Stay near the policy that the stage started from, measured as the divergence of the steps that draw noise.

    L_n = mean (mu - mu_ref)^2 / (2 s^2), the KL divergence of two Gaussian steps of equal s, as a mean over latent
    dimensions; for `flow-sde` that is Delta / 2 (sigma (1 - t) / (2 t) + 1 / sigma)^2 mean (v - v_ref)^2 (Flow-GRPO,
    arXiv:2505.05470). The released code leaves Delta, the step size, out of the variance, so a published coefficient
    of 0.04 is about 0.04 Delta here: `kl_convention: flow_grpo_code`. It also averages where the formula sums.
    """

    name = "kernel-kl"
    requires = Requirements(
        points="trajectory", roles=frozenset({Role.CURRENT, Role.REFERENCE}), advantage=False, stochastic_steps=True
    )

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The divergence from REFERENCE at N steps."""
        kl = step_divergence(points, velocity[Role.CURRENT], velocity[Role.REFERENCE], self.options.kl_convention)
        return Loss(value=weighted_sum(kl, points), metrics={"kl": average(kl, points)}, by_time={"kl": kl.detach()})


class EmaKLOptions(Options):
    """Options of `ema-kl`."""

    decay_rate: float = Field(0.001, ge=0, description="The average's decay grows by this each round.")
    decay_max: float = Field(0.3, ge=0, lt=1, description="The average's decay never exceeds this.")


class EmaKL(PolicyObjective[EmaKLOptions]):
    """Stay near a moving average of the policy itself, so that no round goes far.

    L_n = mean (v - v_ema)^2; after round k, ema <- d ema + (1 - d) current, d = min(rate k, max) (AWM,
    arXiv:2509.25050, whose average also draws the samples: that is its own option `ema_kl`). Nothing is drawn from the
    average here, so it goes with objectives whose samples have to come from the policy itself. 0 until a weight moves.
    """

    name = "ema-kl"
    requires = _needs(Role.EMA)

    def ema_decay(self, step: int) -> float:
        """min(rate step, max)."""
        return min(self.options.decay_rate * step, self.options.decay_max)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The distance to EMA at N points."""
        return _distance(points, velocity[Role.CURRENT], velocity[Role.EMA])


class Anchor(PolicyObjective[NoOptions]):
    """Pull to another finished model on all data: the manifold anchor of Flow-OPD.

    L_n = mean (v - v_anchor)^2, ANCHOR the model of the stage's `anchor` (Flow-OPD, arXiv:2605.08063: a teacher of
    aesthetics, for prompts of every task, weight 0.04). Guided as a teacher is. The source's weight of time is the
    stage's step_weight, which holds for all objectives of the sum. In an rl stage it distils and rewards at once.
    """

    name = "anchor"
    requires = _needs(Role.ANCHOR, contrast=False)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The distance to ANCHOR at N points."""
        return _distance(points, velocity[Role.CURRENT], velocity[Role.ANCHOR])


class NormHingeOptions(Options):
    """Options of `norm-hinge`."""

    margin: float = Field(0.02, ge=0, description="How much larger than that of REFERENCE the velocity may be: 2 %.")


class NormHinge(PolicyObjective[NormHingeOptions]):
    """Keep velocities from growing: nothing below a bound, a square above it.

    L_n = max(0, r - 1 - margin)^2, r = ||v|| / ||v_ref|| of the point. Reinforcement learning inflates velocities by 5
    to 15 %, and pictures oversaturate (NormGuard, arXiv:2606.27771, which holds it with a hinge on the norm). The
    square and the margin are ours; the source's form was not available to us. Where v_ref is 0, as of a network that
    was never trained, there is no bound.
    """

    name = "norm-hinge"
    requires = _needs(Role.REFERENCE)

    @classmethod
    def example(cls) -> Self:
        """With a bound that some velocities of the checks exceed."""
        return cls(NormHingeOptions(margin=0.0))

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The excess at N points."""
        current, reference = widened(velocity[Role.CURRENT]), widened(velocity[Role.REFERENCE].detach())
        size = latent_mean(reference.square())
        squared = torch.where(size > NOTHING, latent_mean(current.square()) / size.clamp_min(NOTHING), 0)
        bound = 1 + self.options.margin
        above = squared > bound**2  # the root has no gradient at 0, and is not needed there
        excess = torch.where(above, squared, squared.new_ones(()) * (bound + 1) ** 2).sqrt() - bound
        hinge = torch.where(above, excess.square(), squared.new_zeros(()))
        metrics = {
            "norm_ratio": average(norm_ratio(current, reference), points),
            "above": average(above.to(hinge.dtype), points),
        }
        return Loss(value=weighted_sum(hinge, points), metrics=metrics)


def _distance(points: Points, v: Tensor, anchor: Tensor) -> Loss:
    """mean (v - anchor)^2, and what to look at."""
    distance = velocity_kl(v, anchor)
    metrics = {"kl": average(distance, points), "norm_ratio": average(norm_ratio(v, anchor), points)}
    return Loss(value=weighted_sum(distance, points), metrics=metrics, by_time={"kl": distance.detach()})
