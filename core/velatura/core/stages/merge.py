"""Merge: one model of several that were trained from the same base, for a cold start or to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from velatura.core.checkpoint import match_tensors
from velatura.core.errors import RecipeError, VelaturaError
from velatura.core.policy import Policy
from velatura.core.stages.common import WEIGHTS, StageRun, manifest_of, read_weights, weights_of

PAIR = ("lora_A", "lora_B")
"""Parts of the names of low-rank factors: the change of a layer is B A."""


def run(stage: StageRun) -> dict[str, Any]:
    """Write the merged weights."""
    config = stage.config
    policy = Policy(stage.adapter().load(stage.device))
    start = {name: value.to("cpu", copy=True) for name, value in policy.weights().items()}
    models = {}
    for source in config.models:
        path = weights_of(stage.run_folder, source)
        models[source] = read_weights(path)
        match_tensors(start, models[source], what=f"{stage.at(f'models.{source}')} ({path})")
    merged = merged_linearly(start, models, config.models)
    result: dict[str, Any] = {"models": dict(config.models)}
    if config.how == "product":
        factors, lost = merged_products(start, models, config.models, stage.at("how"))
        merged |= factors
        result["lost"] = lost
    if not all(bool(torch.isfinite(value).all()) for value in merged.values()):
        raise VelaturaError(f"stage '{stage.name}' ended with weights that are not finite; nothing was saved")
    if stage.ranks.first:
        temporary = stage.folder / f".{WEIGHTS}.tmp"
        save_file(merged, temporary, metadata={"stage": stage.name})
        temporary.replace(stage.folder / WEIGHTS)
    return result | _lineage(stage)


def _lineage(stage: StageRun) -> dict[str, Any]:
    """What the models have in common: guidance folded in at the same scale."""
    results = [manifest_of(stage.run_folder, source)["result"] for source in stage.config.models]
    first = results[0]
    return {key: first[key] for key in ("guidance_scale", "folded", "folded_scale") if key in first}


def merged_linearly(
    start: Mapping[str, Tensor], models: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """start + sum_m w_m (theta_m - start), which is sum_m w_m theta_m where the weights sum to 1.

    Task arithmetic (Ilharco et al., arXiv:2212.04089); model soups (Wortsman et al., arXiv:2203.05482). fp64 inside.
    """
    merged = {}
    for name, base in start.items():
        wide = base.double()
        change = sum((weights[m] * (own[name].double() - wide) for m, own in models.items()), torch.zeros_like(wide))
        merged[name] = (wide + change).to(base.dtype).contiguous()
    return merged


def merged_products(
    start: Mapping[str, Tensor], models: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], at: str = ""
) -> tuple[dict[str, Tensor], float]:
    """Factors of sum_m w_m B_m A_m, cut to the rank r of the factors; and the share of its norm that is cut off.

    The means of the factors are no factors of the mean. Of the stacked factors, B' = [w_m B_m] and A' = [A_m], two QR
    decompositions leave a small matrix, whose singular value decomposition is that of the sum; the best approximation
    of rank r is its first r parts (Eckart and Young), shared by both factors as U sqrt(S) and sqrt(S) V.

    Raises:
        RecipeError: no low-rank factors are trained.
    """
    pairs = [(name, name.replace(*PAIR)) for name in start if PAIR[0] in name and name.replace(*PAIR) in start]
    if not pairs:
        raise RecipeError(
            f"{at}: 'product' merges LoRA weights, and none are trained here. Take how: average or how: add, or set "
            f"the adapter's lora_rank."
        )
    merged, kept, whole = {}, 0.0, 0.0
    for a_name, b_name in pairs:
        b = torch.cat([weights[m] * own[b_name].double() for m, own in models.items()], dim=1)
        a = torch.cat([own[a_name].double() for own in models.values()], dim=0)
        (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(rb @ ra.T)
        rank = start[a_name].shape[0]
        root = s[:rank].sqrt()
        held = min(rank, len(root))
        first, second = torch.zeros(rank, a.shape[1]).double(), torch.zeros(b.shape[0], rank).double()
        first[:held] = root[:, None] * (qa @ v.T[:, :held]).T
        second[:, :held] = qb @ u[:, :held] * root
        merged[a_name], merged[b_name] = first.to(start[a_name].dtype), second.to(start[b_name].dtype)
        kept, whole = kept + float(s[:rank].square().sum()), whole + float(s.square().sum())
    return merged, 1 - (kept / whole) ** 0.5 if whole else 0.0
