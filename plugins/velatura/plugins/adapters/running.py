"""Other ways to compute the same network: attention back-ends and compiled blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import nn

from velatura.api import VelaturaError

VARIANTS = 24
"""How often a kind of block may be compiled before torch gives up and runs it as it is: with and without gradients,
with and without a mask, for one prompt and several, one point and several, and until lengths are known to differ."""


def set_attention(net: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Let diffusers' attention back-end `name` do the attention of `net`.

    Raises:
        VelaturaError: there is none of this name, its package is missing, or it cannot give a gradient on `device` in
            `dtype`, as a small attention shows.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    known = sorted(backend.value for backend in AttentionBackendName)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise VelaturaError(
            f"`attention`: diffusers has no attention back-end '{name}'.{hint} There is: {', '.join(known)}."
        )
    stock = cast("Any", net)
    width = int(dict(stock.config).get("attention_head_dim") or 64)
    try:
        stock.set_attention_backend(name)
        tried = [torch.randn(1, 8, 2, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        dispatch_attention_fn(*tried, backend=AttentionBackendName(name)).float().sum().backward()
    except Exception as error:  # whatever the package of a back-end raises
        reason = str(error).rstrip(".")
        raise VelaturaError(
            f"`attention`: back-end '{name}' cannot train this network on '{device}' in {dtype}: {reason}. Leave the "
            "option out for torch's own."
        ) from error


def compile_blocks(net: nn.Module, compiles: Callable[[Mapping[str, Any]], bool]) -> None:
    """Compile what is repeated in `net`: the blocks that diffusers names, else every list of modules at the top.

    `compiles` is asked at every call of a block, with its arguments by name; where it says no the block runs as it is.

    Raises:
        VelaturaError: there are no such blocks.
    """
    names = getattr(net, "_repeated_blocks", None) or ()
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList)]
    named = [block for block in net.modules() if type(block).__name__ in names]
    blocks = named if names else [block for each in lists for block in each]
    if not blocks:
        raise VelaturaError(
            f"`compile`: {type(net).__name__} names no repeated blocks and has no list of them. Leave the option out."
        )
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    for block in blocks:
        cast("Any", block).forward = _either(block.forward, compiles)


def _either(plain: Callable[..., Any], compiles: Callable[[Mapping[str, Any]], bool]) -> Callable[..., Any]:
    """A block's forward, compiled for some arguments."""
    compiled, signature = torch.compile(plain), inspect.signature(plain)

    def forward(*arguments: Any, **named: Any) -> Any:
        told = signature.bind(*arguments, **named).arguments
        return (compiled if compiles(told) else plain)(*arguments, **named)

    return forward
