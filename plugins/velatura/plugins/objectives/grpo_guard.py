"""Policy gradients whose ratio is centred and of one scale over time."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from velatura.api import Loss, Points, PolicyObjective, Role
from velatura.plugins.objectives.ratio import NEEDS, RatioOptions, draw_of, roles_of, surrogate_loss
from velatura.plugins.objectives.velocity_kl import latent_mean


class GRPOGuardOptions(RatioOptions):
    """Options of `grpo-guard`."""

    clip_range: float = Field(2e-6, gt=0, lt=1, description="The normalised ratio is clipped to 1 ± this.")


class GRPOGuard(PolicyObjective[GRPOGuardOptions]):
    """Flow-GRPO with a normalised ratio (GRPO-Guard, arXiv:2510.22319).

    With delta = mu - mu_old and x_next = mu_old + s eps, log rho = delta eps / s - delta^2 / (2 s^2): its mean is below
    0 and its size depends on the step, so that a clip hardly ever holds back good samples. Here
    rho^ = exp((log rho + delta^2 / (2 s^2)) s) = exp(delta eps), over latent dimensions the mean, and
    L_n = -min(A rho^, A clip(rho^, 1 - c, 1 + c)) + kl KL_n.

    The source also divides the gradient of each step by its size: that is `step_weight: inv-dt` of the stage. The
    clip range is that of the released configuration for SD3.5-M with `flow-sde`.
    """

    name = "grpo-guard"
    requires = NEEDS

    def roles(self) -> frozenset[Role]:
        """REFERENCE only with a KL."""
        return roles_of(self.options)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The clipped surrogate and the KL at N steps."""
        draw = draw_of(points, velocity)
        noise = (draw.x_next - draw.old.mean) / draw.old.std
        log_ratio = latent_mean((draw.current.mean - draw.old.mean) * noise)
        return surrogate_loss(points, velocity, draw, log_ratio, self.options, self.options.clip_range)
