"""Two real processes with gloo and ZeRO compute what one process computes in plain torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from velatura.core.checkpoint import load_checkpoint, save_checkpoint
from velatura.core.engine import Engine, EngineConfig, make_engine

WORKER = Path(__file__).with_name("engine_worker.py")


def loaded(name: str) -> Any:
    """A module beside this one; under this name the worker imports it too."""
    spec = importlib.util.spec_from_file_location(name, WORKER.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


matrix, worker = loaded("engine_matrix"), loaded("engine_worker")

ALL_ROWS = ((0, 5), (5, worker.PROMPTS))
"""One process may cut the batch as it likes."""
FP32 = ["zero-0", "zero-1", "zero-2", "zero-3", "zero-2-offload", "zero-3-offload"]
BF16 = ["zero-1-bf16", "zero-2-bf16", "zero-3-bf16"]
MATRIX = [(kind, case) for kind, cases in matrix.NETS.items() for case in (*cases, "updated")]
Tensors = Mapping[str, Tensor]
Sections = Mapping[str, Tensors]


def plain(steps: int, precision: str = "fp32") -> tuple[Engine, Tensors]:
    """One process, LocalEngine: its gradients of the first step, and the engine after `steps` updates."""
    engine = make_engine(
        worker.new_net(), EngineConfig(kind="local", device="cpu", precision=precision), worker.OPTIMIZER
    )
    worker.backward(engine, 0, ALL_ROWS)
    gradients = dict(engine.gradients())
    engine.zero_grad()
    for step in range(steps):
        worker.run_step(engine, step, ALL_ROWS)
    return engine, gradients


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Sections:
    """What two processes left, after one start-up for all checks."""
    folder = tmp_path_factory.mktemp("ranks")
    engine, _ = plain(1)
    sections = {"policy": worker.weights(engine.module, engine), "optimizer": engine.state_dict()}
    save_checkpoint(folder, 1, sections, {}, keep=1)
    pids = forks.start_all("script", WORKER, folder, cwd=folder, processes=2)
    assert forks.wait(*pids, seconds=900) == [0, 0], (folder / "says.txt").read_text()[-9000:]
    return load_checkpoint(folder / "step-000002").tensors


def assert_close(got: Tensors, expected: Tensors, *, rtol: float, atol: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", FP32)
def test_two_ranks_have_the_gradients_of_one_process(two_ranks: Sections, name: str) -> None:
    """Sums in another order: a few units in the last place of fp32 (1.2e-7), of gradients up to 1."""
    engine, gradients = plain(0)
    assert_close(two_ranks[f"{name}--gradients"], gradients, rtol=1e-5, atol=1e-7)
    info = worker.run_step(engine, 0, ALL_ROWS)
    assert float(two_ranks[f"{name}--info"]["norm"]) == pytest.approx(info.grad_norm, rel=1e-5)
    assert float(two_ranks[f"{name}--info"]["lr"]) == pytest.approx(info.lr)
    assert info.grad_norm > worker.OPTIMIZER.clip_norm  # clipping takes part


@pytest.mark.parametrize("name", FP32)
def test_two_ranks_take_the_updates_of_one_process(two_ranks: Sections, name: str) -> None:
    """Adam divides by |g|: rounding of a small gradient shows, a thousandth of the update (lr 5e-3, then 1e-2)."""
    for section, steps in (("one", 1), ("two", 2), ("resumed", 2)):
        engine, _ = plain(steps)
        assert_close(two_ranks[f"{name}--{section}"], worker.weights(engine.module, engine), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BF16)
def test_two_ranks_at_bf16_have_the_gradients_of_one_process(two_ranks: Sections, name: str) -> None:
    """bf16 keeps 8 bits and each micro-batch is rounded: 2 % of the largest gradient of a tensor."""
    _, gradients = plain(0, "bf16")
    for key, expected in gradients.items():
        got = two_ranks[f"{name}--gradients"][key]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FP32)
@pytest.mark.parametrize("kind", ["local", "deepspeed"])
def test_one_process_goes_on_from_the_checkpoint_of_two(two_ranks: Sections, name: str, kind: str) -> None:
    net = worker.new_net()
    engine = make_engine(net, EngineConfig(kind=kind, device="cpu"), worker.OPTIMIZER)
    net.load_state_dict(dict(two_ranks[f"{name}--two"]))
    engine.load_state_dict(two_ranks[f"{name}--state"])
    worker.run_step(engine, 2, ALL_ROWS)
    expected, _ = plain(3)
    assert_close(worker.weights(net, engine), worker.weights(expected.module, expected), rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def plain_matrix() -> Mapping[str, Sections]:
    """Kind of network -> what plain torch computes in one process."""
    return {kind: matrix.results(EngineConfig(kind="local", device="cpu"), kind) for kind in matrix.NETS}


@pytest.fixture(scope="module")
def matrices(two_ranks: Sections) -> Mapping[tuple[str, str], Sections]:
    """(processes, engine) -> what DeepSpeed computes, under `kind--case`."""
    found: dict[tuple[str, str], Sections] = {}
    for name, config in matrix.ENGINES.items():
        one = {kind: matrix.results(config, kind) for kind in matrix.NETS}
        found["one", name] = {f"{kind}--{case}": one[kind][case] for kind, case in MATRIX}
        found["two", name] = {f"{kind}--{case}": two_ranks[f"{name}--{kind}--{case}"] for kind, case in MATRIX}
    return found


@pytest.mark.parametrize("name", list(matrix.ENGINES))
@pytest.mark.parametrize("processes", ["one", "two"])
def test_every_objective_has_the_gradients_of_plain_torch(
    matrices: Mapping[tuple[str, str], Sections], plain_matrix: Mapping[str, Sections], processes: str, name: str
) -> None:
    """fp32 keeps 24 bits; of the largest gradient of a tensor, sums in another order lose less than one in 20000.
    Adam's step (1e-3) divides by |g|, so where that is small rounding shows: a hundredth of the step."""
    for kind, case in MATRIX:
        got, expected = matrices[processes, name][f"{kind}--{case}"], plain_matrix[kind][case]
        assert got.keys() == expected.keys()
        largest = max(float(value.abs().max()) for value in expected.values())
        assert largest > 1e-4, f"{kind} {case} would be satisfied with zeros"
        for key, value in expected.items():
            scale = 1e-5 if case == "updated" else max(5e-5 * float(value.abs().max()), 1e-7 * largest)
            worst = float((got[key] - value).abs().max())
            assert worst <= scale, f"{kind} {case} {key}: {worst:.2e} of {scale:.2e}"
