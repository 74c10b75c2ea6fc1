"""The generators that a process shares with its libraries are seeded, saved and restored."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from velatura.core.checkpoint import load_checkpoint, save_checkpoint
from velatura.core.random_state import generators_state, restore_generators, seed_generators


def drawn() -> list[float]:
    normal = [random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))]
    return [*normal, random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_generators_go_on_where_a_checkpoint_left_them(tmp_path: Path) -> None:
    seed_generators(1, "stage", 0)
    drawn()
    random.gauss(0, 1)  # one of a pair: the other is kept
    np.random.standard_normal()
    path = save_checkpoint(tmp_path, 1, {}, {}, keep=1, single={"random-0": generators_state()})
    after = [drawn(), drawn()]
    seed_generators(2, "stage", 0)
    assert drawn() != after[0]
    restore_generators(load_checkpoint(path).tensors["random-0"])
    assert [drawn(), drawn()] == after


def test_every_process_and_stage_has_its_own_stream() -> None:
    streams = []
    for path in (("a", 0), ("a", 1), ("b", 0), ("a", 0)):
        seed_generators(1, *path)
        streams.append(tuple(drawn()))
    assert streams[0] == streams[3]
    assert len(set(streams)) == 3
