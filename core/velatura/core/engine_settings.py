"""What a recipe says of the engine and its optimiser. Data only; no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from velatura.core.base_settings import Count, Decay, NotNegative, Positive, Settings, Whole


class Engine(Settings):
    """What executes the loop."""

    kind: Literal["deepspeed", "local"] = Field("deepspeed", description="`local` is plain torch in one process.")
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)] = Field(
        1, description="What DeepSpeed spreads over processes: 1 optimiser states, 2 also gradients, 3 also weights."
    )
    offload_optimizer: bool = Field(
        False, description="Keep masters and moments on the CPU, which then takes the step; with zero_stage 2 or 3."
    )
    offload_weights: bool = Field(False, description="Keep the shards of zero_stage 3 on the CPU.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of the network; latents and losses stay fp32.")
    threads: Count | None = Field(
        None, description="CPU threads, shared by the processes of a machine; torch decides when left out."
    )
    device: str = Field("auto", description="`auto` takes the GPU when there is one; or `cpu`, `cuda`, `cuda:1`.")
    timeout: Positive = Field(
        1800.0,
        description="Seconds after which a process that is gone, or does nothing, ends the run in all processes; also "
        "how long they wait for each other at the start.",
    )
    raw: dict[str, Any] = Field(default_factory=dict, description="Merged into the DeepSpeed configuration as it is.")

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
            raise ValueError(f"no device is called {value!r}. Use auto, cpu, cuda or cuda:N, as in cuda:1")
        return value

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> Engine:
        for name, stage in (("offload_optimizer", 2), ("offload_weights", 3)):
            if getattr(self, name) and (self.kind != "deepspeed" or self.zero_stage < stage):
                there = f"zero_stage {self.zero_stage}" if self.kind == "deepspeed" else "plain torch"
                raise ValueError(
                    f"{name} does not go with {there}: it needs kind deepspeed with zero_stage {stage} or higher. Set "
                    f"zero_stage: {stage}, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _bf16_needs_zero(self) -> Engine:
        if self.kind == "deepspeed" and self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 does not go with zero_stage 0: there DeepSpeed starts Adam at step 1, which spoils "
                "its bias correction. Use zero_stage 1, or precision fp32"
            )
        return self


class Optimizer(Settings):
    """AdamW or Muon, and what happens around its step."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="`muon` orthogonalises the updates of the matrices in the network's blocks and leaves the rest to "
        "AdamW: about twice as fast from scratch. It needs engine.kind local.",
    )
    lr: Positive = Field(1e-4, description="Learning rate after the warm-up.")
    matrix_lr: Positive = Field(0.02, description="Muon only: the rate of the matrices, on the schedule of `lr`.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Decay of the two moments.")
    eps: Positive = Field(1e-8, description="Added to the root of the second moment.")
    weight_decay: NotNegative = Field(0.0, description="Decoupled weight decay.")
    clip_norm: Positive = Field(1.0, description="Largest norm of the gradient.")
    warmup: Whole = Field(0, description="Optimiser steps over which the learning rate grows from 0.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="After the warm-up, down to 0.")
