"""Direct preference optimisation of groups, without a likelihood of steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Options, Points, PolicyObjective, Requirements, Role, VelaturaError
from velatura.plugins.objectives.velocity_kl import average, flow_target, norm_ratio, velocity_kl, weighted_sum


class DGPOOptions(Options):
    """Options of `dgpo`."""

    beta: float = Field(
        100.0, gt=0, description="How sharply a group that already does better than REFERENCE is let go."
    )
    clip_range: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Hold a sample back where exp(d_old - d), d its mean squared error, leaves 1 ± this; null never.",
    )
    max_advantage: float = Field(5.0, gt=0, description="Advantages are clipped to ± this.")
    kl: float = Field(1e-3, ge=0, description="Coefficient of the velocity KL to REFERENCE.")


class DGPO(PolicyObjective[DGPOOptions]):
    """Good samples of a group against its bad ones, as one preference (DGPO, arXiv:2510.08425).

    d_i = mean (v - u_i)^2, d_ref the same of REFERENCE, over the G samples i of a prompt at one time and noise:
    L_i = w A_i d_i + kl mean (v - v_ref)^2,   w = sg sigmoid(beta / G sum_i A_i (d_i - d_ref_i)),
    so that the gradient over the group is 1 / beta that of -G log sigmoid(-beta / G sum_i A_i (d_i - d_ref_i)): a
    group whose good samples the policy already fits better than REFERENCE weighs less. With `clip_range` c,
    A_i d_i becomes max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(d_old - d), OLD the policy that sampled.

    Needs all samples of a group in one micro-batch, re-noised alike; no stochastic steps, no likelihood. beta and kl
    are in the ranges of the released configurations (100; 1e-3 to 0.02; clip 1e-5 to 1e-2); beta with errors as means
    over latents is our reading.
    """

    name = "dgpo"
    requires = Requirements(
        roles=frozenset({Role.CURRENT, Role.OLD, Role.REFERENCE}), advantage=True, whole_group=True, shared_noise=True
    )

    def roles(self) -> frozenset[Role]:
        """OLD only with a clip."""
        return self.requires.roles - (frozenset({Role.OLD}) if self.options.clip_range is None else frozenset())

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The preference and the KL at N points, whole groups of them."""
        current, reference = velocity[Role.CURRENT], velocity[Role.REFERENCE]
        target, limit = flow_target(points), self.options.max_advantage
        error = velocity_kl(current, target)
        advantage = points.advantage.to(error.dtype).clamp(-limit, limit)
        gained = advantage * (error.detach() - velocity_kl(reference.detach(), target))
        share = torch.sigmoid(self.options.beta * group_mean(gained, points))
        metrics = {"preference": average(share, points), "gained": average(-gained, points)}
        surrogate = advantage * error
        if self.options.clip_range is not None:
            ratio = (velocity_kl(velocity[Role.OLD].detach(), target) - error).exp()
            surrogate, held = self._clipped(advantage, ratio, self.options.clip_range)
            metrics |= {"ratio": average(ratio, points), "clipped": average(held, points)}
        policy = share * surrogate
        metrics |= {"policy": average(policy, points), "norm_ratio": average(norm_ratio(current, reference), points)}
        if not self.options.kl:
            return Loss(value=weighted_sum(policy, points), metrics=metrics)
        kl = velocity_kl(current, reference)
        metrics["kl"] = average(kl, points)
        return Loss(value=weighted_sum(policy + self.options.kl * kl, points), metrics=metrics)

    @staticmethod
    def _clipped(advantage: Tensor, ratio: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """The clipped surrogate [N], and where the clip decides, [N]."""
        free, held = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
        return torch.maximum(free, held), (held > free).to(ratio.dtype)


def group_mean(values: Tensor, points: Points) -> Tensor:
    """[N]: for each point the mean of `values` [N] over the samples of its prompt at its time.

    Raises:
        VelaturaError: the points do not say which prompt they are of.
    """
    if points.group is None:
        raise VelaturaError("This objective compares the samples of a prompt, but the points carry no group.")
    places = torch.stack([points.group.double(), points.t.double()], 1)
    _, place = torch.unique(places, dim=0, return_inverse=True)
    count = int(place.max()) + 1
    sums = values.new_zeros(count).index_add(0, place, values)
    return (sums / values.new_zeros(count).index_add(0, place, torch.ones_like(values)))[place]
