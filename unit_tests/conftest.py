"""What every unit test finds as it was."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from velatura.core.stages import showcase

sys.path.insert(0, str(Path(__file__).parent / "adapters" / "families"))
LINEAR = nn.functional.linear


@pytest.fixture(autouse=True, scope="module")
def stock_linear() -> Iterator[None]:
    """DeepSpeed's stage 3 leaves its own linear function in torch, which tests of another file cannot compile."""
    nn.functional.linear = LINEAR
    yield
    nn.functional.linear = LINEAR


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> None:
    """Libraries ask for full collections of garbage, and those need not look at what stays: modules and tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def few_pictures() -> Iterator[None]:
    """Two pictures of a prompt in the grids that show how a model changes: most of a tiny run would draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showcase, "SEEDS", 2)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family of `adapters/families`, built once."""
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: importlib.import_module(name).build(root / name))
