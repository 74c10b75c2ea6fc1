from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from velatura.rewards.faces.reading import OwnReader


@pytest.fixture(scope="session")
def own():
    """The networks, loaded once."""
    return OwnReader(torch.device("cpu"), batch=32)
