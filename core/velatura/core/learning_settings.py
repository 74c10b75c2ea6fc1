"""What stages that learn share: weights of steps, sums of objectives, weights of several models. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

StepWeightName = Literal["uniform", "t", "dt", "dt2", "inv-dt", "sigma-sqrt-dt", "kl"]
STEP_WEIGHT = (
    "Weight of a trained step in the loss, its mean over them 1: of the time t, of the step size dt, or of a kernel "
    "that draws noise, its standard deviation (`sigma-sqrt-dt`) or the factor of its KL (`kl`)."
)


def _of_a_step(value: Any) -> Any:
    """Weights that depend on more than the step are said to be options of something else."""
    if value in ("adaptive-l1", "ghuber", "huber"):
        known = "ghuber" if value == "huber" else value
        raise ValueError(
            f"{value!r} weighs a point by its own error, which a step does not have; it is an option of what takes "
            f"that error: objective: {{use: awm, with: {{weighting: {known}}}}}, or distiller: {{use: velocity-match, "
            f"with: {{weight: {known}}}}}"
        )
    return value


StepWeight = Annotated[StepWeightName, BeforeValidator(_of_a_step)]
PLUS = "Objectives whose losses are added to this one's, each with its weight: regularisers, or another objective."
ANCHOR = "A stage that trained a model: the ANCHOR of an objective that asks for one."
SOLVER = (
    "Of a kernel that draws noise, what takes the steps on which none is drawn: `ode` (Euler's step) unless given. One "
    "of higher order only behind the last step that draws."
)


def sums_to_one(place: str, weights: Mapping[str, Any]) -> None:
    """Weights of several models that are to be one."""
    if not weights:
        raise ValueError(f"{place}: nobody is named. Give one, or several with weights that sum to 1")
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not weight > 0:
            raise ValueError(f"{place}: the weight of {name!r} is {weight!r}. Give a number above 0")
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        scaled = ", ".join(f"{name}: {weight / total:.4g}" for name, weight in weights.items())
        raise ValueError(f"{place}: the weights sum to {total:.6g} and not to 1. In these proportions: {{{scaled}}}")
