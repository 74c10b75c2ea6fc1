"""DeepSpeed: ZeRO 0 to 3 in one process or under torchrun. The only module that imports it."""

from __future__ import annotations

import atexit
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from velatura.core.checkpoint import match_tensors
from velatura.core.engine.local import MOMENTS, adamw, choose_device, clip, placed, set_rate, trained_parameters
from velatura.core.engine.offload import offload_settings, refuse_offload, require_room
from velatura.core.engine.protocol import EngineConfig, OptimizerConfig, StepInfo
from velatura.core.engine.sharded import WholeWeights, own_part, shape_of
from velatura.core.errors import VelaturaError
from velatura.core.ranks import PATIENCE, leave

T = TypeVar("T")
MASTER = "master"
"""Beside the moments: the fp32 weights behind bf16 ones."""

_MODELLED = {
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_weights",
    "bf16.enabled": "engine.precision",
    "gradient_clipping": "optimizer.clip_norm",
    "gradient_accumulation_steps": "the batch options of the stage",
    "train_micro_batch_size_per_gpu": "the batch options of the stage",
}


class DeepSpeedEngine:
    """AdamW behind DeepSpeed's ZeRO, with fp32 master weights and fp32 accumulation of gradients."""

    def __init__(self, module: nn.Module, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        """Take over `module`: move it to the device and the precision, and train what requires a gradient."""
        _refuse(config, optimizer)
        # What torch deprecates and ZeRO still calls, in any forward or step.
        warnings.filterwarnings("ignore", message=r".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)
        device = choose_device(config.device)
        with _quiet():
            deepspeed = _launch(device)
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            self.device = _local_device(device)
            placed(module, self.device, config.precision)
            self._weights = trained_parameters(module)
            trained = sum(p.numel() for p in self._weights.values())
            require_room(config, trained, sum(p.nbytes for p in module.parameters()), self.world_size)
            self._engine, *_ = deepspeed.initialize(
                model=module,
                model_parameters=list(self._weights.values()),
                optimizer=adamw(list(self._weights.values()), optimizer),
                config=_settings(config, optimizer, trained, self.device),
            )
        self.module: nn.Module = self._engine
        self._utils: Any = deepspeed.utils
        self._config = optimizer
        self._updates = 0
        self._complete = False
        self._sharded = config.zero_stage > 0
        self.shards_weights = config.zero_stage == 3
        self._whole = WholeWeights(self._engine) if self.shards_weights else None
        self._offloads = config.offload_optimizer
        self._adam: torch.optim.Optimizer = (
            self._engine.optimizer.optimizer if self._sharded else self._engine.optimizer
        )
        self._keeps_masters = config.precision != "fp32"
        self._begin_moments()

    def whole(self, *, write: bool = False) -> AbstractContextManager[None]:
        """All weights on this rank; they already are, but for stage 3."""
        return nullcontext() if self._whole is None else self._whole(write=write)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; `last` lets DeepSpeed reduce and shard it."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size)  # DeepSpeed averages over ranks, the protocol sums
        self._complete = last

    def step(self) -> StepInfo:
        """Clip, update, forget the gradients."""
        if not self._complete:
            raise RuntimeError("step() comes after backward(..., last=True)")
        rate = self._config.rate(self._updates)
        set_rate(self._adam, rate)
        norm, updated = self._step_sharded() if self._sharded else self._step_whole()
        self._updates += updated
        self.zero_grad()
        return StepInfo(grad_norm=norm, lr=rate, updated=updated)

    def _step_sharded(self) -> tuple[float, bool]:
        """DeepSpeed clips, and skips the update where the norm is not finite."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()

    def _step_whole(self) -> tuple[float, bool]:
        """At stage 0 DeepSpeed neither tells the norm nor skips anything."""
        norm = clip(list(self._weights.values()), self._config.clip_norm)
        if norm.isfinite():
            self._engine.step()
        return float(norm), bool(norm.isfinite())

    def zero_grad(self) -> None:
        """Forget gradients wherever DeepSpeed keeps them: on parameters, accumulated, and sharded."""
        self._engine.zero_grad()
        self._complete = False
        if self._sharded:
            owner = self._engine.optimizer
            owner.zero_grad(set_to_none=True)
            for kept in (getattr(owner, "averaged_gradients", {}), getattr(owner, "all_grad_tensors", {})):
                kept.update(dict.fromkeys(kept))
            self._forget_shards(owner)

    def _forget_shards(self, owner: Any) -> None:
        """Buffers that only parameters which take part write over: the others would step on an old gradient."""
        if self.shards_weights:
            owner.grad_partitions_flat_buffer.zero_()
        if self._offloads:
            for flat in self._flat_masters():
                flat.grad.zero_()
            owner.norm_for_param_grads = {}
            if not self.shards_weights:  # as its own step() leaves it; else a forgotten gradient is added to the next
                owner.micro_step_id, owner.local_overflow = -1, False
                owner._offload_accumulated_param_ids = set()

    def _flat_masters(self) -> list[Any]:
        """What the optimiser steps on behind ZeRO: this rank's shares, end to end."""
        owner = self._engine.optimizer
        if self.shards_weights:
            return list(owner.fp32_partitioned_groups_flat)
        return [shard for group in self._adam.param_groups for shard in group["params"]]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the global sum, one after the other, whole and fp32; zero for a parameter that took no part."""
        if not self._complete:
            raise RuntimeError("gradients() comes after backward(..., last=True)")
        for name, parameter in self._weights.items():
            found = self._utils.safe_get_full_grad(parameter)
            yield name, torch.zeros_like(parameter, dtype=torch.float32) if found is None else found.float().clone()

    def sum(self, x: Tensor) -> Tensor:
        """Sum of every rank's `x`."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def gather_object(self, obj: T) -> list[T]:
        """Every rank's `obj`, in rank order."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, obj)
        return gathered

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def state_dict(self, keep: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """Moments, fp32 masters where the module is bf16, and the count of updates, gathered from all ranks."""
        state = {"updates": torch.tensor(self._updates)} if keep("updates") else {}
        for name, weight in self._weights.items():
            for section in self._sections():
                whole = self._gathered(weight, section)
                if keep(key := f"{section}/{name}"):
                    state[key] = whole.detach().cpu().clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; each rank takes the shards it owns, whatever the world size was."""
        match_tensors(self._expected(), state, what="the optimiser state")
        self.zero_grad()
        self._updates = int(state["updates"])
        for kept in self._adam.state.values():
            kept["step"].fill_(self._updates)
        for name, weight in self._weights.items():
            for moment in MOMENTS:
                self._put(weight, state[f"{moment}/{name}"].to(self.device), moment)
        if not self._sharded:
            return
        with self.whole():
            for name, weight in self._weights.items():
                master = state[f"{MASTER}/{name}"].to(self.device) if self._keeps_masters else weight.detach()
                self._put(weight, master, MASTER)

    def _sections(self) -> tuple[str, ...]:
        return (*MOMENTS, MASTER) if self._keeps_masters else MOMENTS

    def _expected(self) -> dict[str, Tensor]:
        """Names and shapes of the state, without numbers."""
        shapes = {
            f"{section}/{name}": shape_of(weight)
            for name, weight in self._weights.items()
            for section in self._sections()
        }
        return {key: torch.empty(shape, device="meta") for key, shape in {"updates": torch.Size(), **shapes}.items()}

    def _gathered(self, weight: nn.Parameter, section: str) -> Tensor:
        """A moment of `weight`, or its master, from the shards of all ranks."""
        if not self._sharded:
            kept: Tensor = self._adam.state[weight][section]
            return kept
        whole: Tensor = (
            self._utils.safe_get_full_fp32_param(weight)
            if section == MASTER
            else self._utils.safe_get_full_optimizer_state(weight, section)
        )
        return whole

    def _put(self, weight: nn.Parameter, value: Tensor, section: str) -> None:
        """Set this rank's part of it."""
        if not self._sharded:
            self._adam.state[weight][section].copy_(value)
        elif self.shards_weights:  # DeepSpeed's own slicing fails where a shard is padded
            part = own_part(weight, value, self.rank)
            if section == MASTER:
                self._utils.safe_set_local_fp32_param(weight, part)
            else:
                self._utils.safe_set_local_optimizer_state(weight, part, section)
        elif section == MASTER:
            self._utils.safe_set_full_fp32_param(weight, value)
        else:
            self._utils.safe_set_full_optimizer_state(weight, value, section)

    def _begin_moments(self) -> None:
        """Zero moments at step 0, as AdamW would make them at its first step: so that they can be read and set."""
        for shard in self._flat_masters():
            moments = {moment: torch.zeros_like(shard, requires_grad=False) for moment in MOMENTS}
            self._adam.state[shard] = {"step": torch.zeros((), device=shard.device), **moments}
        if self._sharded and not self.shards_weights:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _refuse(config: EngineConfig, optimizer: OptimizerConfig) -> None:
    """Combinations that would train wrongly."""
    if optimizer.kind == "muon":
        raise VelaturaError(
            "optimizer.kind muon needs whole matrices, and DeepSpeed's ZeRO deals them out in pieces. Set engine.kind "
            "to 'local', or optimizer.kind to 'adamw'."
        )
    refuse_offload(config)
    if config.precision == "bf16" and config.zero_stage == 0:
        raise VelaturaError(
            "engine.precision bf16 with engine.zero_stage 0 makes the first updates too small: DeepSpeed takes an "
            "optimiser step of its own at the start. Use zero_stage 1, which costs nothing more."
        )


def _settings(
    config: EngineConfig, optimizer: OptimizerConfig, parameters: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration. The bucket is as small as it may be: a fresh one is allocated in every step."""
    clips_itself = config.zero_stage > 0 and optimizer.clip_norm is not None
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_norm if clips_itself else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": config.zero_stage == 3,  # else nothing is fetched ahead
            "contiguous_gradients": config.zero_stage > 1,
            "reduce_bucket_size": min(max(parameters, 1), 500_000_000),
            **offload_settings(config, device),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the CPU too, and needs no compiler
    }
    if config.precision == "bf16":
        ours["bf16"] = {"enabled": True, "check_grad_overflow": True}
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
        ours["communication_data_type"] = "fp32"  # else fp32 sums are rounded to bf16 before they are reduced
    return _merge(ours, config.raw, "")


def _merge(ours: Mapping[str, Any], raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """`ours` with `raw` laid over it, except where Velatura has an option of its own."""
    merged = dict(ours)
    for key, value in raw.items():
        path = f"{place}{key}"
        if path in _MODELLED:
            raise VelaturaError(f"engine.raw sets {path}; set {_MODELLED[path]} instead")
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value, f"{path}.") if both else value
    return merged


def _launch(device: torch.device) -> Any:
    """Import DeepSpeed and join the other processes; without a launcher there are none."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # Compiled at every start on a CPU, for minutes, in a cache shared by all environments; gloo is as fast here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    for name in ("deepspeed.utils.pin_memory", "deepspeed.module_inject.auto_ep_comm"):
        # What an engine imports when it is collected; amid another import that breaks Python 3.11 (gh-106176).
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=PATIENCE)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        atexit.register(leave)
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed.initialize insists
    return deepspeed


def _local_device(device: torch.device) -> torch.device:
    """The GPU of this rank, unless the recipe names one."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch deprecates and DeepSpeed still uses when it is imported, nor the memory it prints at bf16."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script", category=DeprecationWarning)
        yield
