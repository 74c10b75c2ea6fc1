"""The adapters that open the tiny models of stock families."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from velatura.api import Context, ModelAdapter
from velatura.core.build import build
from velatura.core.recipe import Ref
from velatura.core.registry import Registry


@pytest.fixture
def opened(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., ModelAdapter[Any]]:
    """The adapter of a family's tiny model, set up on the CPU."""

    def make(name: str, precision: str = "fp32", **options: Any) -> ModelAdapter[Any]:
        family = importlib.import_module(name)
        given = {"path": str(tiny(name)), **family.OPTIONS, **options}
        made = build(Registry.discover(), "adapter", Ref.model_validate({"use": family.ADAPTER, "with": given}))
        cpu = torch.device("cpu")
        made.setup(Context(device=cpu, cache=tmp_path / "cache", seed=0, base=tmp_path, precision=precision))  # type: ignore[arg-type]
        return made  # type: ignore[return-value]

    return make
