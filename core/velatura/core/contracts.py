"""Every kind of component."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from velatura.core.components import (
    AdvantageEstimator,
    Component,
    Distiller,
    Evaluator,
    GuidancePolicy,
    Kernel,
    ModelAdapter,
    Observer,
    PolicyObjective,
    PromptFilter,
    RewardModel,
    Task,
    TimestepSampler,
)
from velatura.core.judge_model import JudgeModel

CONTRACTS: Mapping[str, type[Component[Any]]] = {
    contract.kind: contract
    for contract in (
        RewardModel, GuidancePolicy, TimestepSampler, PromptFilter, Distiller, ModelAdapter, Task, Kernel,
        AdvantageEstimator, PolicyObjective, JudgeModel, Evaluator, Observer,
    )
}  # fmt: skip
"""Kind -> contract."""
