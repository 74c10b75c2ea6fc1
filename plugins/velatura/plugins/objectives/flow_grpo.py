"""Clipped policy gradients on the steps of a stochastic rollout."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Points, PolicyObjective, Role
from velatura.plugins.objectives.ratio import NEEDS, RatioOptions, draw_of, roles_of, surrogate_loss


class FlowGRPOOptions(RatioOptions):
    """Options of `flow-grpo`."""

    clip_range: float = Field(
        1e-4, gt=0, lt=1, description="The ratio is clipped to 1 ± this; log-probabilities are means over dimensions."
    )


class FlowGRPO(PolicyObjective[FlowGRPOOptions]):
    """The clipped ratio of every step that drew noise (Flow-GRPO, arXiv:2505.05470).

    rho = exp(log pi(x_next) - log pi_old(x_next)), log-probabilities as means over latent dimensions,
    L_n = -min(A rho, A clip(rho, 1 - c, 1 + c)) + kl KL_n,   A = clip(advantage, -A_max, A_max).

    At the policy that sampled rho is 1 and dL/dmu = -A (x_next - mu) / s^2, over dims. OLD is that policy: it follows
    the current one after every round, so a ratio differs from 1 only with several updates per round. The KL is 0 by
    default; the source takes 0.04 or 0.01 in the convention of its code. Window, mixed and fast variants (MixGRPO,
    arXiv:2507.21802) are timesteps; the noise-aware weight of TempFlow-GRPO (arXiv:2508.04324) is a step_weight;
    kernels are interchangeable, but clip ranges are not across them.
    """

    name = "flow-grpo"
    requires = NEEDS

    def roles(self) -> frozenset[Role]:
        """REFERENCE only with a KL."""
        return roles_of(self.options)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The clipped surrogate and the KL at N steps."""
        draw = draw_of(points, velocity)
        return surrogate_loss(points, velocity, draw, draw.log_ratio, self.options, self.options.clip_range)
