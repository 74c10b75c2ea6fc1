"""Every family learns, and stock classes draw from its export, merged and as LoRA weights, what it draws itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velatura.api import Prompt
from velatura.core.encoding import Encoder
from velatura.core.engine import EngineConfig, OptimizerConfig, make_engine
from velatura.core.learner import Learner
from velatura.core.points import Group, PointNoise, forward_points
from velatura.core.policy import Policy
from velatura.core.selfcheck import self_check
from velatura.plugins.guidance.policies import NoGuidance
from velatura.plugins.objectives.nft import NFT
from velatura.testing import difference_to_pipeline

Make = Callable[..., Any]
FAMILIES = Path(__file__).with_name("families")
sys.path.insert(0, str(FAMILIES))
NAMES = sorted(path.stem for path in FAMILIES.glob("*.py") if path.stem != "parts")
CPU = torch.device("cpu")


def prompt_of(name: str) -> Prompt:
    """An edit where the family edits."""
    edits = importlib.import_module(name).EDITS
    source = (torch.rand(3, 80, 64, generator=torch.Generator().manual_seed(4)) * 255).round() / 255
    return Prompt(id="p", text="a red fox", task="edit" if edits else "t2i", sources=(source,) if edits else ())


def wake(net: nn.Module) -> nn.Module:
    """Fresh LoRA weights add nothing."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.4 * torch.randn(p.shape, generator=draw).to(p))
    return net


@pytest.mark.parametrize("name", NAMES)
def test_every_family_learns_at_bf16_with_gradient_checkpointing(name: str, opened: Make) -> None:
    adapter = opened(name, "bf16", lora_rank=2, gradient_checkpointing=True)
    config = EngineConfig(kind="local", device="cpu", precision="bf16")
    policy = Policy(adapter.load(CPU))
    engine = make_engine(policy.net, config, OptimizerConfig(lr=1e-2))
    for role in ("old", "reference"):
        policy.remember(role)
    learner = Learner(
        engine=engine, policy=policy, adapter=adapter, guidance=NoGuidance(), objective=NFT(),
        encoder=Encoder(adapter, engine.device),
    )  # fmt: skip
    prompt = prompt_of(name)
    group = Group(prompt=prompt, samples=(0, 1), numbers=(0, 1))
    x, noise = adapter.noise([prompt] * 2, [1, 2]), PointNoise(seed=0, step=0, shared=True)
    times, train = adapter.times(4, prompt), torch.tensor([0, 2])
    batch = forward_points([group], x, torch.tensor([1.0, -1.0]), times, train, torch.ones(4), noise, 4)
    self_check(learner, batch)
    before = {key: p.detach().clone() for key, p in policy.parameters.items()}
    told = learner.learn([batch]).metrics
    assert told["updated"] == 1
    assert 0 < told["grad_norm"] < float("inf")
    moved = [key for key, p in policy.parameters.items() if not torch.equal(p, before[key])]
    assert len(moved) >= len(before) / 2 - 2  # of fresh LoRA weights only B has a gradient


@pytest.mark.parametrize("name", NAMES)
def test_stock_classes_draw_from_what_is_exported_what_velatura_draws(
    name: str, opened: Make, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = importlib.import_module(name)
    adapter = opened(name, lora_rank=2, lora_alpha=4)
    net, prompt = wake(adapter.load(CPU)), prompt_of(name)
    monkeypatch.setattr(adapter, "load", lambda _: net)
    place = tmp_path / "export"
    adapter.export(net, place, info={})
    stock, scale = adapter.folder.transformer_class(), 1.0 if getattr(family, "UNGUIDED", False) else 2.0

    def away(folder: Path, *, lora: Path | None = None) -> float:
        """How far what `folder` draws is from what Velatura draws."""
        pipe = opened(name, path=str(folder)).pipe
        pipe.transformer = stock.from_pretrained(folder / "transformer").train(False)
        if lora is not None:
            pipe.load_lora_weights(lora)

        def drawn(prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
            latents: Tensor = family.stock(pipe, prompt, seeds, steps, scale)
            return latents

        joined = getattr(family, "JOINED", False)
        return difference_to_pipeline(adapter, drawn, [prompt], steps=3, scale=scale, joined=joined)

    base, merged = away(tiny(name)), away(place)
    print(f"{name}: base {base:.2g}, merged {merged:.2g}")
    assert base > 5e-3
    assert merged < 1e-3 * base  # sums in another order
    loads = hasattr(type(adapter.pipe), "load_lora_weights")
    assert (place / "lora").is_dir() is loads
    if loads:
        assert away(tiny(name), lora=place / "lora") < 1e-4 * base
