"""What a family's prompts look like without its encoders, and that each family can be rehearsed without its weights."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from velatura.api import Context, Prompt
from velatura.core.build import build
from velatura.core.footprint import Batch, Rehearsal
from velatura.core.recipe import Ref
from velatura.core.registry import Registry
from velatura.plugins.adapters.blank_rows import FAMILIES, blank_row
from velatura.plugins.guidance.policies import NoGuidance
from velatura.plugins.objectives.nft import NFT

FOLDER = Path(__file__).with_name("families")
sys.path.insert(0, str(FOLDER))
MODULES = {path.stem: importlib.import_module(path.stem) for path in FOLDER.glob("*.py") if path.stem != "parts"}
KNOWN = sorted(name for name, family in MODULES.items() if family.ADAPTER in FAMILIES)
AS_LONG_AS_THE_TEXT = ("text", "slots")
"""Tensors whose first axis depends on the tokenizer, where a family does not pad."""


def adapter_of(name: str, place: Path, **given: Any) -> Any:
    family = MODULES[name]
    options = {"path": str(family.build(place / "model")), **family.OPTIONS, **given}
    made = build(Registry.discover(), "adapter", Ref.model_validate({"use": family.ADAPTER, "with": options}))
    made.setup(Context(device=torch.device("cpu"), cache=place / "cache", seed=0, base=place))
    return made


def prompt_of(name: str) -> Prompt:
    edits = MODULES[name].EDITS and getattr(MODULES[name], "MOST_SOURCES", 1) > 0
    sources = (torch.rand(3, 80, 64, generator=torch.Generator().manual_seed(4)),) if edits else ()
    return Prompt(id="p", text="a red fox", task="edit" if edits else "t2i", sources=sources)


@pytest.mark.parametrize("name", KNOWN)
def test_a_blank_row_has_the_shapes_of_a_real_one(name: str, tmp_path: Path) -> None:
    adapter, prompt = adapter_of(name, tmp_path), prompt_of(name)
    real, blank = adapter.cached_row(prompt, prompt.text), blank_row(adapter, prompt, prompt.text)
    assert blank is not None and blank.keys() == real.keys()
    for key, tensor in real.items():
        assert blank[key].dtype == tensor.dtype
        own = 1 if key in AS_LONG_AS_THE_TEXT else 0
        assert blank[key].shape[own:] == tensor.shape[own:], key
    found = adapter.footprint(prompt)
    trained = sum(p.numel() for p in found.net.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in adapter.load(torch.device("cpu")).parameters() if p.requires_grad)
    rehearsal = Rehearsal(adapter, found, prompt, torch.float32, solid=False)
    few, many = (rehearsal.update(Batch(points=n, prompts=1, limit=8), NoGuidance(), NFT()) for n in (1, 3))
    assert 2 * few < many + few < 5 * few  # a part is the prompt's, the rest grows with the points


@pytest.mark.parametrize("tried", [True, False], ids=["encoders tried", "encoders too large"])
@pytest.mark.parametrize("name", ["flux2_klein", "flux_kontext", "qwen_image_21", "qwen_image_edit_plus"])
def test_an_edit_is_rehearsed_with_its_source_in_the_shape_of_its_bucket(
    name: str, tried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tried:
        monkeypatch.setattr("velatura.plugins.adapters.footprints.TRIED_BYTES", 0)
    adapter = adapter_of(name, tmp_path, buckets=[[64, 64], [64, 96], [96, 64]])
    narrow = torch.rand(3, 160, 66, generator=torch.Generator().manual_seed(4))
    prompt = Prompt(id="p", text="a red fox", task="edit", sources=(narrow,))
    found = adapter.footprint(prompt)
    blank, untold, real = found.cond(1), found.null(1), adapter.encode([prompt])
    free = adapter_of(name, tmp_path).encode([prompt])
    assert source_tokens(free) != source_tokens(real)
    assert source_tokens(blank) == source_tokens(untold) == source_tokens(real)


def source_tokens(cond: Any) -> int:
    """Tokens of the source images of a prompt."""
    if hasattr(cond, "sources"):
        return int(cond.sources.shape[1])
    (told,) = [tensor for name, tensor in cond.tensors.items() if name.startswith("source")]
    return int(told.shape[1])


def test_a_family_that_finds_out_its_habits_says_that_it_does_not_know(tmp_path: Path) -> None:
    adapter = adapter_of("diffusers_flow_aura", tmp_path)
    assert adapter.footprint(prompt_of("diffusers_flow_aura")) is None
