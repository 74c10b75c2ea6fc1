"""Before the first update: is what is about to be trained what is meant to be trained?

The commonest fault of this field is a run that trains on something slightly wrong and says nothing. Before any weight
has moved, three things are known exactly, and a run in which they do not hold is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from velatura.core.errors import SelfCheckError
from velatura.core.learner import SET_OF, Learner, Tally, with_zero_advantage
from velatura.core.points import MicroBatch
from velatura.core.types import Role

ARITHMETIC = ("compile", "attention", "gradient_checkpointing")
"""Options of adapters that are suspected first when rollouts and updates differ."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How much of the largest velocity a forward with gradient may differ from one without: other kernels, other sums."""


LIKELIHOOD = {torch.float32: 1e-2, torch.bfloat16: 1.0}
"""How much the log-likelihood of a step, a mean over latent dimensions, may differ when it is looked at again."""


def self_check(learner: Learner, batch: MicroBatch, grids: Sequence[Tensor] = ()) -> None:
    """Check one micro-batch before the first optimiser step.

    1. Ratio 1: old policy and current policy give the same velocity, without gradient, as in rollouts, and with it, as
       in the update.
    2. Reference equals policy, where the run starts at the reference.
    3. Zero advantage gives zero policy gradient, for objectives that contrast samples.
    4. LoRA, where the adapter is to train it, is bound to at least one module.
    5. Points lie at the times of the rollout, and on its path: `grids` are the time grids [T] of its parts.

    Raises:
        SelfCheckError: with what was compared, and by how much it differs.
    """
    if not learner.policy.parameters:
        raise SelfCheckError("the adapter marked no parameter as trainable, so there is nothing to learn")
    _check_lora(learner)
    if grids:
        _check_times(batch, grids)
    _check_path(batch)
    with learner.engine.whole():  # ranks may check batches of different kinds
        if grids:
            _check_likelihood(learner, batch)
        _check_roles(learner, batch)
        if learner.objective.requires.advantage and learner.objective.requires.contrast:
            _check_zero_advantage(learner, batch)


def _check_lora(learner: Learner) -> None:
    """A rank that was asked for, and nothing of that rank in what is trained."""
    rank = getattr(learner.adapter.options, "lora_rank", None)
    if rank is None or any("lora" in name.lower() for name in learner.policy.parameters):
        return
    names = list(learner.policy.parameters)
    raise SelfCheckError(
        f"LoRA of rank {rank} was asked for, but it is bound to 0 modules: none of the {len(names)} trained parameters "
        f"is LoRA's, the first is {names[0]!r}. Name other `lora_targets`, or train all weights (`lora_rank: null`)."
    )


def _check_times(batch: MicroBatch, grids: Sequence[Tensor]) -> None:
    """The times at which the update evaluates the network are those at which the rollout did, and states are what
    those times say."""
    points = batch.points
    steps = {pair for grid in grids for pair in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)}
    times = {start for start, _ in steps}
    if strange := [t for t in points.t.tolist() if t not in times]:
        began = ", ".join(f"{t:.6f}" for t in sorted(times, reverse=True))
        raise SelfCheckError(
            f"before the first update a point lies at t = {strange[0]:.6f}, at which the rollout took no step; its "
            f"steps began at {began}. The sigmas of training are not those of the rollout."
        )
    if points.t_next is not None:
        pairs = list(zip(points.t.tolist(), points.t_next.tolist(), strict=True))
        if wrong := [pair for pair in pairs if pair not in steps]:
            raise SelfCheckError(
                f"before the first update a point goes from t = {wrong[0][0]:.6f} to {wrong[0][1]:.6f}, which is no "
                f"step of the rollout. The sigmas of training are not those of the rollout."
            )


def _check_path(batch: MicroBatch) -> None:
    """x_t = x_0 + t u, for points that were noised."""
    x, x0, target = batch.points.x, batch.points.x0, batch.points.target
    if x0 is None or target is None:
        return
    share = batch.points.t.reshape(-1, *[1] * (x.ndim - 1))
    gap, size = float((x - x0 - share * target).abs().max()), float(x.abs().max())
    if not gap <= 1e-4 * max(size, 1.0):
        raise SelfCheckError(
            f"before the first update the noised states are off by up to {gap:.2e} from x_0 + t u at the times that "
            f"the network is told: noise was mixed in at other sigmas than those of training."
        )


def _check_likelihood(learner: Learner, batch: MicroBatch) -> None:
    """A step of the rollout is as likely when the update looks at it as when it was drawn; where both are guided alike,
    which `allow_biased_ratio` gives up."""
    points, scale = batch.points, learner.guidance.scale
    if points.kernel is None or points.log_prob is None or points.x_next is None or points.t_next is None:
        return
    if not torch.equal(scale(Role.OLD, points.t), scale(Role.ROLLOUT, points.t)):
        return
    (frozen,) = learner.frozen([batch], Tally())
    velocity = frozen.get(Role.OLD)
    if velocity is None:
        with torch.no_grad():
            velocity = learner.velocities(batch, Tally(), frozen)[Role.CURRENT]
    t, t_next = (time.reshape(-1, *[1] * (points.x.ndim - 1)) for time in (points.t, points.t_next))
    again = points.kernel.log_prob(points.x_next, points.kernel.step(velocity.float(), points.x, t, t_next))
    known = points.log_prob.isfinite()
    gap = float((again - points.log_prob)[known].abs().max()) if bool(known.any()) else 0.0
    dtypes = {parameter.dtype for parameter in learner.policy.net.parameters()}
    allowed = max(LIKELIHOOD.get(dtype, 0.0) for dtype in dtypes)
    if not gap <= allowed:
        raise SelfCheckError(
            f"before the first update the log-likelihood of a step of the rollout, looked at again, differs by up to "
            f"{gap:.2e} from what was noted when it was drawn; rounding explains {allowed:.2e}. Kernel "
            f"'{points.kernel.name}' or the sigmas of training are not those of the rollout.{_suspects(learner)}"
        )


def _check_roles(learner: Learner, batch: MicroBatch) -> None:
    cond = learner.encoder.cond(batch.prompts)
    points = batch.points

    def velocity(name: str) -> torch.Tensor:
        with learner.policy.forced(name) as net:
            return learner.adapter.velocity(net, points.x, points.t, learner.adapter.prepare(net, cond), batch.rows)

    current = velocity("current")
    if not bool(torch.isfinite(current).all()):
        raise SelfCheckError("the current policy's velocity is not finite before any update. Check the base weights.")
    for role in (Role.OLD, Role.EMA, Role.REFERENCE):
        if role not in learner.objective.roles():
            continue
        gap = float((velocity(SET_OF[role]) - current).abs().max())
        if gap > 0:  # equal weights at equal batch shapes give equal bits
            raise SelfCheckError(
                f"before the first update the {role} policy differs from the current one by up to {gap:.2e} in "
                f"velocity; they must be equal (ratio 1). The adapter's forward is not deterministic (dropout on?), "
                f"or its weights were changed behind the run's back.{_suspects(learner)}"
            )
    _check_update(learner, batch, current)


def _check_update(learner: Learner, batch: MicroBatch, sampled: torch.Tensor) -> None:
    """The velocity that gets a gradient is the one that rollouts followed, but for the rounding of its precision."""
    net, points = learner.engine.module, batch.points
    cond = learner.adapter.prepare(net, learner.encoder.cond(batch.prompts))
    updated = learner.adapter.velocity(net, points.x, points.t, cond, batch.rows).detach()
    gap, size = float((updated - sampled).abs().max()), float(sampled.abs().max())
    dtypes = {parameter.dtype for parameter in learner.policy.net.parameters()}
    allowed = max(ROUNDING.get(dtype, 0.0) for dtype in dtypes) * size
    if not gap <= allowed:
        raise SelfCheckError(
            f"before the first update the velocity of the update differs by up to {gap:.2e} from that of rollouts at "
            f"the same states and weights; rounding explains {allowed:.2e}. Learning would start from pictures that "
            f"the trained network does not draw.{_suspects(learner)}"
        )


def _suspects(learner: Learner) -> str:
    """Options of the adapter that let other arithmetic compute the same network."""
    given = learner.adapter.options.model_dump(exclude_defaults=True)
    named = ", ".join(f"`{name}: {str(given[name]).lower()}`" for name in ARITHMETIC if name in given)
    return f" A likely cause is the adapter's {named}: leave it out and try again." if named else ""


def _check_zero_advantage(learner: Learner, batch: MicroBatch) -> None:
    learner.accumulate(with_zero_advantage(batch), Tally(), last=True)
    norms = {name: float(gradient.norm()) for name, gradient in learner.engine.gradients()}
    learner.engine.zero_grad()
    worst = max(norms, key=lambda name: norms[name])
    if norms[worst] > 0:
        raise SelfCheckError(
            f"samples that are exactly as good as their group still move the policy: objective "
            f"'{learner.objective.name}' gives gradient norm {norms[worst]:.2e} on '{worst}' at zero advantage"
        )
