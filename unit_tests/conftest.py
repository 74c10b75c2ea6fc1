"""What every unit test finds as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from torch import nn

from velatura.core.stages import showcase

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
