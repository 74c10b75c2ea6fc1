"""Merge: what several trained models learned, added up without any training."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from velatura.core.errors import VelaturaError
from velatura.core.merging import merge
from velatura.core.policy import Policy
from velatura.core.stages.common import WEIGHTS, StageRun, manifest_of, read_weights, weights_of

CARRIED = ("guidance_scale", "folded", "folded_scale")
"""What a merged model has from its parts, where they agree."""


def run(stage: StageRun) -> dict[str, Any]:
    """Write the merged weights; which route came from whom is kept for the evaluation."""
    config = stage.config
    adapter = stage.adapter()
    policy: Policy = stage.load_policy(adapter, "base")
    start = {name: value.to("cpu", copy=True) for name, value in policy.weights().items()}
    parts = {}
    for route, model in config.models.items():
        path = weights_of(stage.run_folder, model)
        policy.load(read_weights(path), what=str(path))  # says what does not fit
        parts[route] = {name: value.to("cpu", copy=True) for name, value in policy.weights().items()}
    shares = config.shares()
    merged = merge(start, list(parts.values()), [shares[route] for route in parts])
    if not all(bool(torch.isfinite(value).all()) for value in merged.values()):
        raise VelaturaError(f"stage '{stage.name}' merged to weights that are not finite; nothing was saved")
    if stage.ranks.first:
        temporary = stage.folder / f".{WEIGHTS}.tmp"
        save_file({name: value.contiguous() for name, value in merged.items()}, temporary,
                  metadata={"stage": stage.name})  # fmt: skip
        temporary.replace(stage.folder / WEIGHTS)
    return _common(stage) | {"teachers": dict(config.models), "shares": shares}


def _common(stage: StageRun) -> dict[str, Any]:
    """Facts on which all parts agree."""
    facts = [manifest_of(stage.run_folder, model)["result"] for model in stage.config.models.values()]
    return {
        name: facts[0][name]
        for name in CARRIED
        if name in facts[0] and all(f.get(name) == facts[0][name] for f in facts)
    }
