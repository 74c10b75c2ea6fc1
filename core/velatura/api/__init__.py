"""The one import of a plugin author. What is exported here is public; everything else may change."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from velatura.core.components import (
    AdvantageEstimator,
    ComparesPairs,
    Component,
    Distiller,
    Evaluator,
    GuidancePolicy,
    Kernel,
    ModelAdapter,
    NoOptions,
    Observer,
    Options,
    PolicyObjective,
    PromptFilter,
    RewardModel,
    Task,
    TimestepSampler,
)
from velatura.core.deprecation import Renamed
from velatura.core.errors import VelaturaError
from velatura.core.events import CheckpointSaved, RolloutDone, RunEnd, RunStart, StepEnd
from velatura.core.hookspecs import hookimpl
from velatura.core.judge_model import JudgeModel

if TYPE_CHECKING:
    from velatura.core.calibrated import Calibration
    from velatura.core.ratings import Rated
    from velatura.core.types import (
        Admission,
        Advantages,
        Conditioning,
        Context,
        Loss,
        Points,
        Prompt,
        Requirements,
        RewardReport,
        Role,
        Rollout,
        RolloutPart,
        Sample,
        Scores,
        State,
        Status,
        StepPlan,
        Transition,
        Usage,
    )

__all__ = [
    "Admission",
    "AdvantageEstimator",
    "Advantages",
    "Calibration",
    "CheckpointSaved",
    "ComparesPairs",
    "Component",
    "Conditioning",
    "Context",
    "Distiller",
    "Evaluator",
    "GuidancePolicy",
    "JudgeModel",
    "Kernel",
    "Loss",
    "ModelAdapter",
    "NoOptions",
    "Observer",
    "Options",
    "Points",
    "PolicyObjective",
    "Prompt",
    "PromptFilter",
    "Rated",
    "Renamed",
    "Requirements",
    "RewardModel",
    "RewardReport",
    "Role",
    "Rollout",
    "RolloutDone",
    "RolloutPart",
    "RunEnd",
    "RunStart",
    "Sample",
    "Scores",
    "State",
    "Status",
    "StepEnd",
    "StepPlan",
    "Task",
    "TimestepSampler",
    "Transition",
    "Usage",
    "VelaturaError",
    "hookimpl",
]

# What holds tensors is imported when its name is first read: a module of hooks, which every command imports,
# needs `hookimpl` alone.
_WITH_TORCH = ("types", "ratings", "calibrated")


def __getattr__(name: str) -> Any:  # Any: what a module holds has no common type
    """A public name of the modules that import torch (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = [import_module(f"velatura.core.{module}") for module in _WITH_TORCH]
    found = next(vars(module)[name] for module in modules if name in vars(module))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
