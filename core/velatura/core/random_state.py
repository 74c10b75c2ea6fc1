"""The generators that a process shares with its libraries. Velatura draws from named streams (`velatura.core.seeds`);
what a plugin or a layer draws without one comes from here, and is seeded and saved all the same."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from velatura.core.seeds import derive


def seed_generators(seed: int, *path: str | int) -> None:
    """Put the generators of this process at the start of the stream `path`."""
    own = derive(seed, "process", *path)
    torch.manual_seed(own)  # of all devices
    np.random.seed(own % 2**32)
    random.seed(own)


def generators_state() -> dict[str, Tensor]:
    """Where the generators of torch, numpy and Python stand, as tensors."""
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    if (version, name) != (3, "MT19937"):
        raise RuntimeError(f"generators of an unknown kind: Python's version {version}, numpy's {name}")
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(key).astype(np.int64)),
        "numpy_rest": torch.tensor([float(position), float(has_gauss), cached], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_generators(state: Mapping[str, Tensor]) -> None:
    """Go on from there; a GPU that was not there before keeps the state it has."""
    torch.set_rng_state(state["torch"])
    position, has_gauss, cached = state["numpy_rest"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(position), int(has_gauss), cached))
    gauss = float(state["python_rest"][0])
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
