"""Other ways to compute the same network: attention back-ends and compiled blocks."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import nn

from velatura.api import VelaturaError


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


def compile_blocks(net: nn.Module) -> None:
    """Compile what is repeated in `net`, each kind of block once: as diffusers names them, else every list of modules
    at the top."""
    stock = cast("Any", net)
    if getattr(stock, "_repeated_blocks", None):
        stock.compile_repeated_blocks()
        return
    blocks = [block for child in net.children() if isinstance(child, nn.ModuleList) for block in child]
    if not blocks:
        raise VelaturaError(
            f"`compile`: {type(net).__name__} names no repeated blocks and has no list of them. Leave the option out."
        )
    for block in blocks:
        block.compile()
