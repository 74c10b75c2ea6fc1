"""Before the first update: is what is about to be trained what is meant to be trained?

The commonest fault of this field is a run that trains on something slightly wrong and says nothing. Before any weight
has moved, three things are known exactly, and a run in which they do not hold is refused.
"""

from __future__ import annotations

import torch

from velatura.core.errors import SelfCheckError
from velatura.core.learner import SET_OF, Learner, Tally, with_zero_advantage
from velatura.core.points import MicroBatch
from velatura.core.types import Role

ARITHMETIC = ("compile", "attention", "gradient_checkpointing")
"""Options of adapters that are suspected first when rollouts and updates differ."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How much of the largest velocity a forward with gradient may differ from one without: other kernels, other sums."""


def self_check(learner: Learner, batch: MicroBatch) -> None:
    """Check one micro-batch before the first optimiser step.

    1. Ratio 1: old policy and current policy give the same velocity, without gradient, as in rollouts, and with it, as
       in the update.
    2. Reference equals policy, where the run starts at the reference.
    3. Zero advantage gives zero policy gradient, for objectives that contrast samples.

    Raises:
        SelfCheckError: with what was compared, and by how much it differs.
    """
    if not learner.policy.parameters:
        raise SelfCheckError("the adapter marked no parameter as trainable, so there is nothing to learn")
    _check_roles(learner, batch)
    if learner.objective.requires.advantage and learner.objective.requires.contrast:
        _check_zero_advantage(learner, batch)


def _check_roles(learner: Learner, batch: MicroBatch) -> None:
    cond = learner.encoder.cond(batch.prompts)
    points = batch.points

    def velocity(name: str) -> torch.Tensor:
        with learner.policy.forced(name) as net:
            return learner.adapter.velocity(net, points.x, points.t, learner.adapter.prepare(net, cond), batch.rows)

    current = velocity("current")
    if not bool(torch.isfinite(current).all()):
        raise SelfCheckError("the current policy's velocity is not finite before any update. Check the base weights.")
    for role in (Role.OLD, Role.REFERENCE):
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
