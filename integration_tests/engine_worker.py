"""One of two ranks: trains on this rank's share with each ZeRO stage and leaves what `test_engines` compares.

Usage: engine_worker.py FOLDER, which holds a checkpoint of LocalEngine after one update.
"""

from __future__ import annotations

import sys
import zlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import engine_matrix as matrix
import torch
from torch import Tensor, nn

from velatura.core import checkpoint
from velatura.core.checkpoint import load_checkpoint, load_latest, save_checkpoint
from velatura.core.engine import Engine, EngineConfig, OptimizerConfig, StepInfo, make_engine
from velatura.core.errors import CheckpointError
from velatura.core.ranks import Ranks, rank, world_size

OPTIMIZER = OptimizerConfig(lr=1e-2, clip_norm=0.05, weight_decay=0.1, warmup=2)
PROMPTS = 13
SHARES = (((0, 3), (3, 4), (4, 8)), ((8, 10), (10, 12), (12, 13)))
"""Rows of each micro-batch of each rank: 8 and 5 prompts, three micro-batches."""
CONFIGS = {
    **{f"zero-{stage}": EngineConfig(zero_stage=stage, device="cpu", threads=1) for stage in (0, 1, 2)},
    "zero-3": matrix.ENGINES["zero-3"],
    "zero-2-offload": EngineConfig(zero_stage=2, device="cpu", threads=1, offload_optimizer=True),
    "zero-3-offload": replace(matrix.ENGINES["zero-3"], offload_optimizer=True, offload_weights=True),
    **{f"zero-{s}-bf16": EngineConfig(zero_stage=s, device="cpu", threads=1, precision="bf16") for s in (1, 2)},
    "zero-3-bf16": replace(matrix.ENGINES["zero-3"], precision="bf16"),
}
RANKS = Ranks(rank(), world_size())


def new_net() -> nn.Module:
    """Odd sizes, so that the halves of ZeRO meet inside a tensor."""
    torch.manual_seed(11)  # nn.Linear takes no generator
    return nn.Sequential(nn.Linear(9, 31), nn.Tanh(), nn.LayerNorm(31), nn.Linear(31, 17), nn.Tanh(), nn.Linear(17, 5))


def run_step(engine: Engine, step: int, rows: tuple[tuple[int, int], ...], factor: float = 1.0) -> StepInfo:
    backward(engine, step, rows, factor)
    return engine.step()


def backward(engine: Engine, step: int, rows: tuple[tuple[int, int], ...], factor: float = 1.0) -> None:
    """The loss of every prompt over the count of all prompts, whoever computes it."""
    dtype = next(engine.module.parameters()).dtype
    x = torch.randn(PROMPTS, 9, generator=torch.Generator().manual_seed(step))
    for index, (begin, end) in enumerate(rows):
        loss = engine.module(x[begin:end].to(dtype)).float().square().sum() / PROMPTS
        engine.backward(loss * factor, last=index == len(rows) - 1)


def weights(net: nn.Module, engine: Engine) -> dict[str, Tensor]:
    with engine.whole():
        return {name: p.detach().clone() for name, p in net.named_parameters()}


def frozen_forward(net: nn.Module, engine: Engine) -> None:
    """Other weights, and not on every rank: rollouts are of unequal length."""
    with engine.whole():
        _frozen_forward(net, engine)


def _frozen_forward(net: nn.Module, engine: Engine) -> None:
    own = {p: p.data for p in net.parameters()}
    for p in net.parameters():
        p.data = torch.ones_like(p)
    if engine.rank == 0:
        with torch.no_grad():
            engine.module(torch.ones(1, 9, dtype=next(net.parameters()).dtype))
    for p, data in own.items():
        p.data = data


def check_alike(engine: Engine, tensors: dict[str, Tensor]) -> None:
    """Bit for bit on every rank."""
    for other in engine.gather_object({name: t.float().numpy().tobytes() for name, t in tensors.items()}):
        assert other == {name: t.float().numpy().tobytes() for name, t in tensors.items()}


def check_communication(engine: Engine) -> None:
    assert engine.world_size == 2
    mine = torch.tensor([1.0, 10.0]) * (engine.rank + 1)
    assert engine.sum(mine).tolist() == [3, 30]
    assert mine.tolist() == [1.0 * (engine.rank + 1), 10.0 * (engine.rank + 1)]
    assert engine.gather_object(("rank", engine.rank)) == [("rank", 0), ("rank", 1)]
    engine.barrier()


def exercise(config: EngineConfig, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Everything that two ranks must do alike with one engine."""
    net = new_net()
    engine = make_engine(net, config, OPTIMIZER)
    check_communication(engine)
    rows = SHARES[engine.rank]
    backward(engine, 0, rows)
    gradients = dict(engine.gradients())
    engine.zero_grad()
    first = run_step(engine, 0, rows)
    assert first.updated
    after_one = weights(net, engine)
    frozen_forward(net, engine)
    broken = run_step(engine, 1, rows, float("nan") if engine.rank == 1 else 1.0)
    assert not broken.updated
    check_alike(engine, weights(net, engine))
    assert all(torch.equal(value, after_one[name]) for name, value in weights(net, engine).items())
    run_step(engine, 1, rows)
    after_two, state = weights(net, engine), engine.state_dict()
    for tensors in (gradients, after_two, state):
        check_alike(engine, tensors)
    return {
        "gradients": gradients,
        "info": {"norm": torch.tensor(first.grad_norm), "lr": torch.tensor(first.lr)},
        "one": after_one,
        "two": after_two,
        "state": state,
        "resumed": resume(config, folder) if config.precision == "fp32" else {},
    }


def resume(config: EngineConfig, folder: Path) -> dict[str, Tensor]:
    """The second update, after a first one that one process made with the plain engine."""
    saved = load_checkpoint(folder / "step-000001")
    net = new_net()
    engine = make_engine(net, config, OPTIMIZER)
    with engine.whole(write=True):
        net.load_state_dict(dict(saved.tensors["policy"]))
    engine.load_state_dict(saved.tensors["optimizer"])
    run_step(engine, 1, SHARES[engine.rank])
    return weights(net, engine)


def check_that_a_checkpoint_is_agreed_on(folder: Path, engine: Engine) -> None:
    """Each process writes a part of it, and none has it where one of them could not."""
    whole = engine.state_dict()
    mine = engine.state_dict(lambda name: zlib.crc32(name.encode()) % 2 == engine.rank)
    assert 0 < len(mine) < len(whole)
    save_checkpoint(folder, 1, {"optimizer": mine}, {"by": "both"}, keep=1, ranks=RANKS)
    full = OSError(28, "No space left on device")
    with mock.patch.object(checkpoint, "save_file", side_effect=full) if engine.rank else mock.MagicMock():
        try:
            save_checkpoint(folder, 2, {"optimizer": mine}, {}, keep=1, ranks=RANKS)
        except CheckpointError as error:
            assert "No space left" in str(error)
            assert str(error).startswith("process 1: cannot write") or engine.rank == 1
        else:
            raise AssertionError("half a checkpoint was taken for one")
    engine.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001"]
    found = load_latest(folder, RANKS)
    assert found is not None
    assert (found.step, found.state) == (1, {"by": "both"})
    check_alike(engine, dict(found.tensors["optimizer"]))
    assert all(torch.equal(found.tensors["optimizer"][name], value) for name, value in whole.items())
    restored = new_net()
    other = make_engine(restored, CONFIGS["zero-3"], OPTIMIZER)
    other.load_state_dict(found.tensors["optimizer"])  # from stage 2
    assert all(torch.equal(value, whole[name]) for name, value in other.state_dict().items())


def main(folder: Path) -> None:
    sections: dict[str, dict[str, Tensor]] = {}
    for name, config in CONFIGS.items():
        results = exercise(config, folder)
        sections |= {f"{name}--{section}": tensors for section, tensors in results.items()}
    engine = make_engine(new_net(), CONFIGS["zero-2"], OPTIMIZER)
    run_step(engine, 0, SHARES[engine.rank])
    check_that_a_checkpoint_is_agreed_on(folder / "agreed", engine)
    for name, config in matrix.ENGINES.items():
        for kind in matrix.NETS:
            found = matrix.results(config, kind)
            sections |= {f"{name}--{kind}--{case}": dict(tensors) for case, tensors in found.items()}
    if engine.rank == 0:
        save_checkpoint(folder, 2, sections, {}, keep=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
