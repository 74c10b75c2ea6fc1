"""Low-rank weights on a stock network, and the stock network that they amount to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor, nn

from velatura.api import VelaturaError

LORA_NAME = "policy"
"""The peft name of the adapter that `add_lora` attaches."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""What is trained unless something else is named."""

BLOCK = re.compile(r"^\w+\.\d+\.(?=.*[A-Za-z])")
"""What begins the name of a layer in a repeated block, like `transformer_blocks.3.`: the same in all of them."""


def unwrap(net: nn.Module) -> Any:
    """The transformer inside an engine's wrapper, for its configuration; it is called through the wrapper."""
    return getattr(net, "module", net)


def add_lora(
    net: nn.Module,
    rank: int,
    alpha: float,
    *,
    seed: int = 0,
    targets: Sequence[str] = ATTENTION,
) -> None:
    """Attach trainable low-rank weights, W + alpha / rank B A, to the modules `targets`; freeze everything else.

    B starts at zero, so the network computes what it did before; A is drawn from `seed`.
    """
    from peft import LoraConfig

    net.requires_grad_(False)
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            layers = sorted({BLOCK.sub("", name) for name in names})
            near = get_close_matches(target, {layer.split(".", n)[-1] for layer in layers for n in range(3)}, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise VelaturaError(
                f"`lora_targets`: LoRA found no linear layer called {target}, so nothing of that name would be "
                f"trained.{hint} There is: {', '.join(layers)}."
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws from the global generator
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        cast("Any", net).add_adapter(config, adapter_name=LORA_NAME)


def merged_state(net: nn.Module) -> dict[str, Tensor]:
    """The weights of the stock class that compute what `net` computes now: active LoRA weights are folded in."""
    from peft.tuners.lora import LoraLayer

    network = unwrap(net)
    state = {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer) and not module.disable_adapters:
            delta = sum(module.get_delta_weight(adapter).detach() for adapter in module.active_adapters)
            state[f"{name}.weight"] = state[f"{name}.weight"] + delta
    return state
