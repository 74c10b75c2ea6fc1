"""Engines: whatever computes gradients and moves weights. DeepSpeed lives here and nowhere else."""

from __future__ import annotations

import torch
from torch import nn

from velatura.core.engine.protocol import Engine, EngineConfig, OptimizerConfig, StepInfo

__all__ = ["Engine", "EngineConfig", "OptimizerConfig", "StepInfo", "make_engine"]


def make_engine(module: nn.Module, config: EngineConfig, optimizer: OptimizerConfig) -> Engine:
    """The engine that `config` names, owning `module`, which must hold its first weights already.

    Moves the module to the device and the precision, and trains the parameters that require a gradient.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.kind == "local":
        from velatura.core.engine.local import LocalEngine

        return LocalEngine(module, config, optimizer)
    from velatura.core.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, config, optimizer)
