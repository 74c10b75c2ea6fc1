"""The whole extension surface on one screen: one hook per kind, without arguments.

A hook returns what its plugin provides: classes, or strings `"name = package.module:Class"` that are imported when a
recipe names them (so that listing plugins stays quick). It is called only when somebody asks for its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from velatura.core import components as c
    from velatura.core.judge_model import JudgeModel

PROJECT = "velatura"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def velatura_adapter() -> Sequence[type[c.ModelAdapter[Any]] | str]:  # type: ignore[empty-body]
    """Model adapters: make one network speak velocity."""


@hookspec
def velatura_task() -> Sequence[type[c.Task[Any]] | str]:  # type: ignore[empty-body]
    """Tasks: where prompts and source images come from."""


@hookspec
def velatura_guidance() -> Sequence[type[c.GuidancePolicy[Any]] | str]:  # type: ignore[empty-body]
    """Guidance policies: which role is guided, and how strongly."""


@hookspec
def velatura_kernel() -> Sequence[type[c.Kernel[Any]] | str]:  # type: ignore[empty-body]
    """Kernels: one step of the sampler as a distribution."""


@hookspec
def velatura_timesteps() -> Sequence[type[c.TimestepSampler[Any]] | str]:  # type: ignore[empty-body]
    """Timestep samplers: which steps are trained, which draw noise."""


@hookspec
def velatura_prompt_filter() -> Sequence[type[c.PromptFilter[Any]] | str]:  # type: ignore[empty-body]
    """Prompt filters: which prompts are worth learning from."""


@hookspec
def velatura_reward() -> Sequence[type[c.RewardModel[Any]] | str]:  # type: ignore[empty-body]
    """Reward models: judge finished images."""


@hookspec
def velatura_advantage() -> Sequence[type[c.AdvantageEstimator[Any]] | str]:  # type: ignore[empty-body]
    """Advantage estimators: from scores to how much better than its group a sample is."""


@hookspec
def velatura_objective() -> Sequence[type[c.PolicyObjective[Any]] | str]:  # type: ignore[empty-body]
    """Objectives: a loss in velocities by role."""


@hookspec
def velatura_distiller() -> Sequence[type[c.Distiller[Any]] | str]:  # type: ignore[empty-body]
    """Distillers: objectives whose target is a teacher's velocity on the student's trajectory."""


@hookspec
def velatura_judge_model() -> Sequence[type[JudgeModel[Any]] | str]:  # type: ignore[empty-body]
    """Judge models: judges that learn from ratings."""


@hookspec
def velatura_evaluator() -> Sequence[type[c.Evaluator[Any]] | str]:  # type: ignore[empty-body]
    """Evaluators: metrics that are never trained on."""


@hookspec
def velatura_observer() -> Sequence[type[c.Observer[Any]] | str]:  # type: ignore[empty-body]
    """Observers: trackers and callbacks."""
