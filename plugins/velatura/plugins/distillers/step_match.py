"""On-policy distillation by the steps that drew noise: the divergence itself, or its policy gradient."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from velatura.api import Distiller, Loss, Points, Prompt, Requirements, Role
from velatura.plugins.distillers.routing import RouteOptions, routed
from velatura.plugins.objectives.ratio import Convention, clipped, draw_of, step_divergence, transition
from velatura.plugins.objectives.velocity_kl import average, norm_ratio, velocity_kl, weighted_sum


class OPDKLOptions(RouteOptions):
    """Options of `opd-kl`."""

    kl_convention: Convention = Field(
        "paper", description="`paper`: mean (mu - mu_T)^2 / (2 s^2); `flow_grpo_code`: that times the step size."
    )


class OPDKL(Distiller[OPDKLOptions]):
    """Pull each step that draws noise to the one its teacher would take: the KL divergence of both.

    L_n = mean (mu_S - mu_T)^2 / (2 s^2), both steps from the state that the student visited, as a mean over latent
    dimensions (DiffusionOPD, arXiv:2605.15055; with `kl_convention: flow_grpo_code` as in the released code of
    Flow-OPD, arXiv:2605.08063). mu is affine in the velocity, so this is `velocity-match` under the weight
    (d mu / d v)^2 / (2 s^2) and on other states: those of a rollout with noise. Needs a kernel that draws; on the ODE
    its form is `velocity-match` with `weight: dt2`. As s goes to 0 it grows without bound.
    """

    name = "opd-kl"
    requires = Requirements(
        points="trajectory", roles=frozenset({Role.CURRENT, Role.TEACHER}), advantage=False, stochastic_steps=True
    )

    def teacher(self, prompt: Prompt) -> str:
        """The prompt's task, or its category."""
        return routed(self.options, prompt)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The divergence from TEACHER at N steps."""
        student, teacher = velocity[Role.CURRENT], velocity[Role.TEACHER].detach()
        kl = step_divergence(points, student, teacher, self.options.kl_convention)
        metrics = _compared(points, student, teacher) | {"kl": average(kl, points)}
        return Loss(value=weighted_sum(kl, points), metrics=metrics, by_time={"kl": kl.detach()})


class OPDPGOptions(RouteOptions):
    """Options of `opd-pg`."""

    clip_range: float = Field(
        1e-4, gt=0, lt=1, description="The ratio is clipped to 1 ± this; log-probabilities are means over dimensions."
    )
    max_advantage: float = Field(5.0, gt=0, description="The reward of a step is clipped to ± this.")


class OPDPG(Distiller[OPDPGOptions]):
    """The teacher's opinion of each step that was drawn as its reward, in a clipped policy gradient.

    r_n = log pi_T(x_next) - log pi_old(x_next), log-probabilities as means over latent dimensions,
    L_n = -min(A rho, A clip(rho, 1 - c, 1 + c)),   A = clip(r, -A_max, A_max),   rho = pi(x_next) / pi_old(x_next).

    In expectation over the noise its gradient at the policy that sampled is that of `opd-kl` over the number of latent
    dimensions, with more variance (DiffusionOPD, arXiv:2605.15055). Flow-OPD (arXiv:2605.08063) clips so, too, but
    takes the divergence in closed form as the reward of a step, which is the same whatever was drawn: by itself that
    gives no gradient in expectation, so the reward here is of what was drawn.
    """

    name = "opd-pg"
    requires = Requirements(
        points="trajectory", roles=frozenset({Role.CURRENT, Role.OLD, Role.TEACHER}), rollout_role=Role.OLD,
        advantage=False, stochastic_steps=True,
    )  # fmt: skip

    def teacher(self, prompt: Prompt) -> str:
        """The prompt's task, or its category."""
        return routed(self.options, prompt)

    def loss(self, points: Points, velocity: Mapping[Role, Tensor]) -> Loss:
        """The clipped surrogate at N steps."""
        student, teacher = velocity[Role.CURRENT], velocity[Role.TEACHER].detach()
        draw, limit = draw_of(points, velocity), self.options.max_advantage
        reward = draw.kernel.log_prob(draw.x_next, transition(points, teacher)) - draw.log_prob_old
        ratio = draw.log_ratio.exp()
        policy, held = clipped(reward.detach().clamp(-limit, limit), ratio, self.options.clip_range)
        metrics = _compared(points, student, teacher) | {
            "step_reward": average(reward, points),
            "ratio": average(ratio, points),
            "log_ratio": average(draw.log_ratio, points),
            "clipped": average(held, points),
        }
        by_time = {"ratio": ratio.detach(), "clipped": held}
        return Loss(value=weighted_sum(policy, points), metrics=metrics, by_time=by_time)


def _compared(points: Points, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """What to look at, whatever the loss."""
    return {
        "distance": average(velocity_kl(student, teacher), points),
        "norm_ratio": average(norm_ratio(student, teacher), points),
    }
