"""Every family samples, bit for bit, what its stock pipeline samples."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from velatura.api import Context, ModelAdapter, Prompt, VelaturaError
from velatura.core.build import build
from velatura.core.recipe import Ref
from velatura.core.registry import Registry
from velatura.testing import difference_to_pipeline

FAMILIES = Path(__file__).with_name("families")
sys.path.insert(0, str(FAMILIES))
NAMES = sorted(path.stem for path in FAMILIES.glob("*.py") if path.stem != "parts")
MODULES = {name: importlib.import_module(name) for name in NAMES}
CASES = [
    (name, count)
    for name, module in MODULES.items()
    for count in range(1 if getattr(module, "ONLY_EDITS", False) else 0, 3 if module.EDITS else 1)
]
"""Every family with the numbers of source images that it is for."""


def pictures(count: int) -> tuple[torch.Tensor, ...]:
    """Source images of different shapes, in the 8 bits that files have."""
    draw = torch.Generator().manual_seed(4)
    shapes = [(80, 64), (64, 96)][:count]
    return tuple((torch.rand(3, *shape, generator=draw) * 255).round() / 255 for shape in shapes)


def adapter_of(family: ModuleType, folder: Path, tmp_path: Path) -> ModelAdapter[Any]:
    options = {"path": str(folder), "lora_rank": None, **family.OPTIONS}
    made = build(Registry.discover(), "adapter", Ref.model_validate({"use": family.ADAPTER, "with": options}))
    made.setup(Context(device=torch.device("cpu"), cache=tmp_path / "cache", seed=0, base=tmp_path))
    return made  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, built once."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: MODULES[name].build(root / name))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("name", "count"), CASES)
def test_the_rollout_is_the_stock_pipeline(
    name: str, count: int, scale: float, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    family = MODULES[name]
    adapter = adapter_of(family, folder(name), tmp_path)
    pipe = adapter.pipe  # type: ignore[attr-defined]
    pipe.transformer = adapter.load(torch.device("cpu"))
    prompt = Prompt(id="p", text="a red fox", task="edit" if count else "t2i", sources=pictures(count))

    def stock(prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> torch.Tensor:
        return family.stock(pipe, prompt, seeds, steps, scale)

    joined = getattr(family, "JOINED", False)
    if scale > 1 and getattr(family, "UNGUIDED", False):
        with pytest.raises(VelaturaError, match="guidance to `none`"):
            difference_to_pipeline(adapter, stock, [prompt], scale=scale)
    elif count > getattr(family, "MOST_SOURCES", count):
        with pytest.raises(VelaturaError, match=f"has {count} source images"):
            adapter.encode([prompt])
    else:
        assert difference_to_pipeline(adapter, stock, [prompt], scale=scale, joined=joined) == 0.0
