"""Plain torch in one process: the reference that every other engine must agree with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from velatura.core.checkpoint import match_tensors
from velatura.core.engine.muon import MOMENTUM, block_matrices, muon
from velatura.core.engine.protocol import EngineConfig, OptimizerConfig, StepInfo
from velatura.core.errors import VelaturaError

T = TypeVar("T")

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter."""


class LocalEngine:
    """AdamW, or Muon beside it, on the module's own parameters, or on fp32 copies of them where the module is bf16."""

    def __init__(self, module: nn.Module, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        """Take over `module`: move it to the device and the precision, and train what requires a gradient."""
        if config.raw:
            raise VelaturaError("engine.raw is DeepSpeed's configuration; engine.kind is 'local'. Remove one of them.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise VelaturaError("engine.kind 'local' is one process, but a launcher started several. Use 'deepspeed'.")
        self.rank, self.world_size = 0, 1
        self.shards_weights = False
        self.device = choose_device(config.device)
        self.module = placed(module, self.device, config.precision)
        self._config = optimizer
        self._updates = 0
        self._complete = False
        self._weights = trained_parameters(module)
        self._masters = {name: _master(p) for name, p in self._weights.items()}
        matrices = block_matrices(module, self._masters) if optimizer.kind == "muon" else {}
        rest = {name: master for name, master in self._masters.items() if name not in matrices}
        self._optimizers: list[tuple[torch.optim.Optimizer, float, tuple[str, ...], dict[str, nn.Parameter]]] = []
        if rest:
            self._optimizers.append((adamw(list(rest.values()), optimizer), 1.0, MOMENTS, rest))
        if matrices:
            share = optimizer.matrix_lr / optimizer.lr
            self._optimizers.append((muon(list(matrices.values()), optimizer), share, MOMENTUM, matrices))

    def whole(self, *, write: bool = False) -> AbstractContextManager[None]:
        """Nothing to do: weights are whole."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`."""
        loss.backward()  # type: ignore[no-untyped-call]
        self._complete = last

    def step(self) -> StepInfo:
        """Clip, update, forget the gradients."""
        if not self._complete:
            raise RuntimeError("step() comes after backward(..., last=True)")
        rate = self._config.rate(self._updates)
        norm = clip(list(self._masters.values()), self._config.clip_norm)
        updated = bool(norm.isfinite())
        if updated:
            for updater, share, _, _ in self._optimizers:
                set_rate(updater, rate * share)
                updater.step()
            self._updates += 1
            self._publish()
        self.zero_grad()
        return StepInfo(grad_norm=float(norm), lr=rate, updated=updated)

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        for updater, *_ in self._optimizers:
            updater.zero_grad(set_to_none=True)
        self._complete = False

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The accumulated gradients, one after the other, fp32; zero for a parameter that took no part."""
        if not self._complete:
            raise RuntimeError("gradients() comes after backward(..., last=True)")
        for name, parameter in self._masters.items():
            yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()

    def sum(self, x: Tensor) -> Tensor:
        """A copy of `x`: there is one rank."""
        return x.clone()

    def gather_object(self, obj: T) -> list[T]:
        """`[obj]`: there is one rank."""
        return [obj]

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def state_dict(self, keep: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """Moments, fp32 masters where the module is bf16, and the count of updates; of these what to `keep`."""
        state = {"updates": torch.tensor(self._updates)}
        for updater, _, moments, owned in self._optimizers:
            for name, master in owned.items():
                for moment in moments:
                    kept = updater.state[master].get(moment, torch.zeros_like(master))
                    state[f"{moment}/{name}"] = kept.detach().cpu().clone()
        for name, master in self._masters.items():
            if master is not self._weights[name]:
                state[f"master/{name}"] = master.detach().cpu().clone()
        return {name: value for name, value in state.items() if keep(name)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; the module must hold the weights that belong to it."""
        match_tensors(self.state_dict(), state, what="the optimiser state")
        self._updates = int(state["updates"])
        for updater, _, moments, owned in self._optimizers:
            for name, master in owned.items():
                updater.state[master] = {m: state[f"{m}/{name}"].to(master, copy=True) for m in moments}
                if moments is MOMENTS:
                    updater.state[master]["step"] = torch.tensor(float(self._updates), device=self.device)
        for name, master in self._masters.items():
            if master is not self._weights[name]:
                master.data.copy_(state[f"master/{name}"])
        self.zero_grad()

    def _publish(self) -> None:
        """Round the masters into the weights of the forward pass."""
        for name, master in self._masters.items():
            if master is not self._weights[name]:
                self._weights[name].data.copy_(master.data)


def _master(weight: nn.Parameter) -> nn.Parameter:
    """`weight` itself, or an fp32 copy in which the gradients of a bf16 weight add up without being rounded."""
    if weight.dtype == torch.float32:
        return weight
    master = nn.Parameter(weight.detach().float())

    def accumulate(p: Tensor) -> None:
        gradient = p.grad.float() if p.grad is not None else torch.zeros_like(master)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        p.grad = None

    weight.register_post_accumulate_grad_hook(accumulate)  # type: ignore[no-untyped-call]
    return master


def choose_device(name: str, asked: str = "engine.device") -> torch.device:
    """The device of this process; `auto` is CUDA where there is one. `asked`: what gave the name, for messages.

    Raises:
        VelaturaError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise VelaturaError(f"{asked} is {name!r}, but torch sees no CUDA device. Use 'auto' or 'cpu'.")
    try:
        device = torch.device(name)
        torch.empty(0, device="meta" if device.type == "cuda" else device)
    except (RuntimeError, AssertionError) as error:  # no such name; or torch is not compiled for it
        reason = str(error).split("\n")[0].rstrip(".")
        raise VelaturaError(
            f"{asked} is {name!r}, which cannot be used here: {reason}. Use 'auto', 'cpu', 'cuda' or 'cuda:N'."
        ) from error
    return device


def check_precision(device: torch.device, precision: str) -> None:
    """Refuse a precision that the device only imitates, or does not have.

    Raises:
        VelaturaError: with what it is and what to take instead.
    """
    if precision != "bf16":
        return
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            major, minor = torch.cuda.get_device_capability(device)
            raise VelaturaError(
                f"engine.precision is 'bf16', but {torch.cuda.get_device_name(device)} (compute capability "
                f"{major}.{minor}) has no bf16 arithmetic; GPUs from 8.0 on do. Set it to 'fp32', or take another GPU."
            )
        return
    try:
        one = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        one @ one
    except (RuntimeError, TypeError, AssertionError) as error:
        raise VelaturaError(
            f"engine.precision is 'bf16', which device '{device}' cannot compute ({error}). Set it to 'fp32'."
        ) from error


def placed(module: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """The module on `device`, cast only where it is not in that precision yet."""
    check_precision(device, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    foreign = any(p.is_floating_point() and p.dtype is not dtype for p in module.parameters())
    return module.to(device, dtype) if foreign else module.to(device)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise VelaturaError("no parameter of the model requires a gradient: there is nothing to train")
    return trained


def adamw(parameters: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimiser of every engine."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def set_rate(adam: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step have the learning rate `rate`."""
    for group in adam.param_groups:
        group["lr"] = rate


def clip(parameters: Sequence[Tensor], longest: float | None) -> Tensor:
    """The global norm of the gradients, which are scaled down to `longest` if they are longer.

    A parameter that took no part gets a zero gradient, as in ZeRO's flat buffers: its weight and moments decay.
    """
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if longest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, longest, norm)
    return norm
