"""What ZeRO keeps on the CPU, and whether this machine has room for it."""

from __future__ import annotations

import os
from typing import Any

import torch

from velatura.core.engine.protocol import EngineConfig
from velatura.core.errors import VelaturaError

MASTER_AND_MOMENTS = 16
"""Bytes on the CPU per trained number of a rank's share: master, gradient and two moments in fp32."""


def refuse_offload(config: EngineConfig) -> None:
    """Offload that the stage does not have.

    Raises:
        VelaturaError: with the stage it needs.
    """
    if config.offload_optimizer and config.zero_stage < 2:
        raise VelaturaError(
            f"engine.offload_optimizer needs engine.zero_stage 2 or 3, and it is {config.zero_stage}: below 2 every "
            "process keeps whole gradients on its GPU. Use zero_stage 2."
        )
    if config.offload_weights and config.zero_stage < 3:
        raise VelaturaError(
            f"engine.offload_weights needs engine.zero_stage 3, and it is {config.zero_stage}: below 3 every process "
            "has all weights on its GPU. Use zero_stage 3."
        )


def offload_settings(config: EngineConfig, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration of it. Pinned memory is what lets a GPU copy while it computes."""
    there = {"device": "cpu", "pin_memory": device.type == "cuda"}
    settings: dict[str, Any] = {}
    if config.offload_optimizer:
        settings["offload_optimizer"] = dict(there)
    if config.offload_weights:
        settings["offload_param"] = dict(there)
    return settings


def require_room(config: EngineConfig, trained: int, weights: int, world_size: int) -> None:
    """Refuse to begin what would end with the machine out of memory, minutes later and without a word.

    `trained`: numbers that are trained; `weights`: bytes of all weights.

    Raises:
        VelaturaError: with what is needed and what is free.
    """
    share = -(-trained * MASTER_AND_MOMENTS // world_size) if config.offload_optimizer else 0
    share += -(-weights // world_size) if config.offload_weights else 0
    if not share:
        return
    import psutil  # DeepSpeed brings it

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = int(psutil.virtual_memory().available)
    if share * local > free:
        raise VelaturaError(
            f"engine.offload_optimizer and offload_weights would keep {share * local / 1e9:.1f} GB in this machine's "
            f"memory ({local} processes with {share / 1e9:.1f} GB each), of which {free / 1e9:.1f} GB are free. Spread "
            "the run over more machines, train with LoRA, or leave them out."
        )
