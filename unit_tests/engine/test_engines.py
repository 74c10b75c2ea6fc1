"""What holds for every engine. Without a launcher DeepSpeed runs in this process; two real ones: integration_tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from velatura.core.checkpoint import load_checkpoint, save_checkpoint
from velatura.core.engine import Engine, EngineConfig, OptimizerConfig, make_engine
from velatura.core.engine.local import check_precision, choose_device
from velatura.core.engine.offload import require_room
from velatura.core.errors import CheckpointError, VelaturaError

SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}}
"""Else ZeRO 3 leaves parameters as small as these where they are, and hides its mistakes."""
CONFIGS = {
    "local": EngineConfig(kind="local", device="cpu"),
    "zero-0": EngineConfig(zero_stage=0, device="cpu"),
    "zero-1": EngineConfig(zero_stage=1, device="cpu"),
    "zero-2": EngineConfig(zero_stage=2, device="cpu"),
    "zero-3": EngineConfig(zero_stage=3, device="cpu", raw=SMALL),
    "zero-2-offload": EngineConfig(zero_stage=2, device="cpu", offload_optimizer=True),
    "zero-3-offload": EngineConfig(zero_stage=3, device="cpu", offload_optimizer=True, offload_weights=True, raw=SMALL),
    "local-bf16": EngineConfig(kind="local", precision="bf16", device="cpu"),
    "zero-1-bf16": EngineConfig(zero_stage=1, precision="bf16", device="cpu"),
    "zero-2-bf16": EngineConfig(zero_stage=2, precision="bf16", device="cpu"),
    "zero-2-offload-bf16": EngineConfig(zero_stage=2, precision="bf16", device="cpu", offload_optimizer=True),
    "zero-3-bf16": EngineConfig(zero_stage=3, precision="bf16", device="cpu", raw=SMALL),
}


class Net(nn.Module):
    """Trained layers of odd sizes, a frozen one, and one that `forward` uses only on request."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: Callable[..., AbstractContextManager[None]] = lambda write=False: nullcontext()
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.first = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.last = nn.Linear(11, 3)
        self.extra = nn.Linear(11, 3, bias=False)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(self.frozen(x.to(self.frozen.weight.dtype)))))
        return (self.last(hidden) + self.extra(hidden) if extra else self.last(hidden)).float()


def new_net() -> Net:
    torch.manual_seed(3)  # nn.Linear takes no generator
    return Net()


def batch(step: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(100 + step))


def loss(engine: Engine, x: Tensor, share: float = 1.0, extra: bool = True) -> Tensor:
    return engine.module(x, extra).square().mean() * share


Make = Callable[..., tuple[Net, Engine]]


SLOW_TO_MAKE = "zero-1-bf16"  # DeepSpeed collects garbage five times at its start


@pytest.fixture(params=[name for name in CONFIGS if name != SLOW_TO_MAKE])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes the same network behind an engine of each kind."""

    return partial(engine_of, request.param)


def engine_of(kind: str, **options: object) -> tuple[Net, Engine]:
    net = new_net()
    optimizer = replace(OptimizerConfig(lr=1e-2, clip_norm=0.5, weight_decay=0.1), **options)
    engine = make_engine(net, CONFIGS[kind], optimizer)
    net.whole = engine.whole
    return net, engine


def train(engine: Engine, steps: range) -> None:
    """Two unequal micro-batches a step."""
    for step in steps:
        x = batch(step)
        engine.backward(loss(engine, x[:2], 2 / 6), last=False)
        engine.backward(loss(engine, x[2:], 4 / 6), last=True)
        engine.step()


def weights(net: nn.Module) -> dict[str, Tensor]:
    with net.whole() if isinstance(net, Net) else nullcontext():
        return {name: p.detach().clone() for name, p in net.named_parameters()}


def put(net: Net, tensors: Mapping[str, Tensor]) -> None:
    with net.whole(write=True):
        net.load_state_dict(dict(tensors))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_gradient_is_that_of_the_sum_of_all_losses(make: Make) -> None:
    net, engine = make()
    x = batch(0)
    expected = new_net().to(net.last.weight.dtype)
    expected(x).square().mean().backward()
    engine.backward(loss(engine, x[:2], 2 / 6), last=False)
    engine.backward(loss(engine, x[2:], 4 / 6), last=True)
    got = dict(engine.gradients())
    assert set(got) == {name for name, p in net.named_parameters() if p.requires_grad}
    for name, p in expected.named_parameters():
        if p.requires_grad:
            exact = p.dtype == torch.float32  # one sum in another order; bf16 has 8 bits
            torch.testing.assert_close(
                got[name], p.grad.float(), rtol=1e-5 if exact else 2e-2, atol=1e-7 if exact else 2e-2
            )


@pytest.mark.parametrize("precision", ["", "-bf16"])
def test_every_engine_takes_the_same_first_steps(precision: str) -> None:
    """Adam amplifies rounding where gradients are small, hence three steps and not three hundred."""
    states = {}
    for name in [name for name in CONFIGS if name.endswith("bf16") == bool(precision)]:
        net, engine = engine_of(name)
        train(engine, range(3))
        states[name] = weights(net) | engine.state_dict()
    reference = states["local" + precision]
    for state in states.values():
        assert state.keys() == reference.keys()
        for key, value in reference.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def test_the_first_update_is_adamw_of_the_clipped_gradient(make: Make) -> None:
    """At the first step both bias-corrected moments are the gradient: p (1 - lr wd) - lr g / (|g| + eps)."""
    net, engine = make(lr=0.5, eps=1.0, clip_norm=0.25, weight_decay=0.1)
    before = weights(net)
    engine.backward(loss(engine, batch(0)), last=True)
    gradients = dict(engine.gradients())
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    info = engine.step()
    assert info.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert info.grad_norm > 0.25
    assert info.updated
    assert info.lr == 0.5
    for name, g in gradients.items():
        clipped = g * 0.25 / (norm + 1e-6)
        expected = before[name].float() * (1 - 0.5 * 0.1) - 0.5 * clipped / (clipped.abs() + 1.0)
        got = weights(net)[name]
        torch.testing.assert_close(
            got, expected.to(got.dtype), rtol=1e-2 if got.dtype != torch.float32 else 1e-5, atol=1e-6
        )
    assert torch.equal(weights(net)["frozen.weight"], before["frozen.weight"])


def test_a_parameter_that_took_no_part_has_a_zero_gradient_and_still_decays(make: Make) -> None:
    net, engine = make(lr=0.1, weight_decay=0.5)
    before = weights(net)["extra.weight"]
    engine.backward(loss(engine, batch(0), extra=False), last=True)
    assert not dict(engine.gradients())["extra.weight"].any()
    engine.step()
    torch.testing.assert_close(
        weights(net)["extra.weight"], (before.float() * 0.95).to(before.dtype), rtol=1e-2, atol=1e-6
    )


def test_a_parameter_that_takes_no_part_any_more_has_no_gradient_of_an_earlier_step(make: Make) -> None:
    _, engine = make()
    train(engine, range(2))
    engine.backward(loss(engine, batch(2), extra=False), last=True)
    gradients = dict(engine.gradients())
    assert not gradients["extra.weight"].any()
    assert gradients["last.weight"].any()


def test_a_state_may_be_gathered_in_parts(make: Make) -> None:
    _, engine = make()
    train(engine, range(1))
    whole = engine.state_dict()
    assert same(engine.state_dict(lambda name: name.endswith("last.weight")), {
        name: value for name, value in whole.items() if name.endswith("last.weight")
    })  # fmt: skip


def test_offload_is_refused_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = EngineConfig(zero_stage=3, offload_optimizer=True, offload_weights=True)
    require_room(config, trained=0, weights=100, world_size=2)
    require_room(EngineConfig(zero_stage=3), trained=10**9, weights=10**9, world_size=2)
    with pytest.raises(VelaturaError, match=r"would keep 18\.0 GB .*2 processes with 9\.0 GB each.* 0\.0 GB are free"):
        require_room(config, trained=10**9, weights=2 * 10**9, world_size=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_moves_nothing(make: Make, value: float) -> None:
    net, engine = make()
    other, untouched = make()
    train(engine, range(2))
    train(untouched, range(2))
    engine.backward(loss(engine, batch(7), value), last=True)
    info = engine.step()
    assert not info.updated
    assert not torch.tensor(info.grad_norm).isfinite()
    assert same(weights(net), weights(other))
    assert same(engine.state_dict(), untouched.state_dict())
    train(engine, range(2, 4))
    train(untouched, range(2, 4))
    assert same(weights(net), weights(other))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_forgotten_gradients_leave_the_engine_as_it_was(make: Make, last: bool, steps: int) -> None:
    net, engine = make()
    other, untouched = make()
    train(engine, range(steps))
    train(untouched, range(steps))
    engine.backward(loss(engine, batch(9)), last=False)
    engine.backward(loss(engine, batch(8)), last=last)
    engine.zero_grad()
    train(engine, range(steps, steps + 2))
    train(untouched, range(steps, steps + 2))
    assert same(weights(net), weights(other))
    assert same(engine.state_dict(), untouched.state_dict())


def test_weights_lent_for_a_frozen_forward_leave_training_unchanged_bit_for_bit(make: Make) -> None:
    net, engine = make()
    other, untouched = make()
    for step in range(3):
        with engine.whole():
            own = {p: p.data for p in net.parameters()}
            for p in net.parameters():
                p.data = torch.full_like(p, 0.5)
            with torch.no_grad():
                lent = engine.module(batch(step))
            for p, data in own.items():
                p.data = data
            assert not torch.allclose(lent, net(batch(step)).detach())
        train(engine, range(step, step + 1))
        train(untouched, range(step, step + 1))
    assert same(weights(net), weights(other))


def test_a_frozen_forward_between_forward_and_backward_changes_nothing(make: Make) -> None:
    net, engine = make()
    other, untouched = make()
    for step in range(2):
        value = loss(engine, batch(step))
        with torch.no_grad():
            engine.module(batch(50))
        engine.backward(value, last=True)
        engine.step()
        untouched.backward(loss(untouched, batch(step)), last=True)
        untouched.step()
    assert same(weights(net), weights(other))


def test_two_forwards_may_share_one_backward(make: Make) -> None:
    _, engine = make()
    x = batch(0)
    engine.backward(loss(engine, x[:3], 0.5) + loss(engine, x[3:], 0.5), last=True)
    got = dict(engine.gradients())
    engine.zero_grad()
    engine.backward(loss(engine, x), last=True)
    for name, g in engine.gradients():
        exact = engine.state_dict().get(f"master/{name}") is None
        torch.testing.assert_close(got[name], g, rtol=1e-5 if exact else 2e-2, atol=1e-7 if exact else 2e-2)


def test_a_resumed_run_is_the_run_that_was_never_stopped_bit_for_bit(make: Make, tmp_path: Path) -> None:
    net, engine = make(schedule="cosine", warmup=2, total=8)
    train(engine, range(7))
    stopped_net, stopped = make(schedule="cosine", warmup=2, total=8)
    train(stopped, range(4))
    sections = {"policy": weights(stopped_net), "optimizer": stopped.state_dict()}
    saved = load_checkpoint(save_checkpoint(tmp_path, 4, sections, {}, keep=1))
    resumed_net, resumed = make(schedule="cosine", warmup=2, total=8)
    train(resumed, range(20, 22))  # whatever it held is replaced
    put(resumed_net, saved.tensors["policy"])
    resumed.load_state_dict(saved.tensors["optimizer"])
    train(resumed, range(4, 7))
    assert same(weights(resumed_net), weights(net))
    assert same(resumed.state_dict(), engine.state_dict())


def test_a_run_may_resume_before_its_first_update(make: Make) -> None:
    net, engine = make()
    other, resumed = make()
    resumed.load_state_dict(make()[1].state_dict())
    train(engine, range(2))
    train(resumed, range(2))
    assert same(weights(net), weights(other))


def test_the_state_of_one_engine_is_read_by_every_other(make: Make) -> None:
    net, engine = make()
    train(engine, range(3))
    bf16 = net.last.weight.dtype == torch.bfloat16
    for name in [name for name in CONFIGS if name.endswith("bf16") == bf16 and name != SLOW_TO_MAKE]:
        other, reader = engine_of(name)
        put(other, weights(net))
        reader.load_state_dict(engine.state_dict())
        assert same(reader.state_dict(), engine.state_dict())


def test_the_state_of_another_model_is_refused(make: Make) -> None:
    _, engine = make()
    state = engine.state_dict()
    state["exp_avg/last.weight"] = torch.zeros(3, 12)
    with pytest.raises(CheckpointError, match=r"another model.*exp_avg/last.weight.*\[3, 11\].*\[3, 12\]"):
        engine.load_state_dict(state)


def test_a_step_without_a_last_micro_batch_is_a_mistake_of_the_caller(make: Make) -> None:
    _, engine = make()
    engine.backward(loss(engine, batch(0)), last=False)
    with pytest.raises(RuntimeError, match="last=True"):
        engine.step()


def test_one_process_is_rank_0_of_1(make: Make) -> None:
    _, engine = make()
    assert (engine.rank, engine.world_size, engine.device) == (0, 1, torch.device("cpu"))
    x = torch.ones(3)
    total = engine.sum(x)
    total += 1
    assert x.tolist() == [1, 1, 1]
    assert engine.gather_object({"a": 1}) == [{"a": 1}]
    engine.barrier()


def test_the_rate_rises_linearly_and_then_follows_the_schedule() -> None:
    constant = OptimizerConfig(lr=1.0, warmup=4)
    assert [constant.rate(u) for u in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    linear = OptimizerConfig(lr=2.0, warmup=2, schedule="linear", total=12)
    assert [linear.rate(u) for u in (2, 7, 12, 20)] == pytest.approx([2, 1, 0, 0])
    cosine = OptimizerConfig(lr=2.0, schedule="cosine", total=12)
    assert [cosine.rate(u) for u in (0, 3, 6, 12)] == pytest.approx([2, 1 + 0.5**0.5, 1, 0])
    with pytest.raises(ValueError, match="total > warmup"):
        OptimizerConfig(lr=1.0, schedule="cosine")


def test_each_update_has_the_rate_of_the_schedule(make: Make) -> None:
    _, engine = make(lr=1.0, schedule="linear", warmup=1, total=3)
    rates = []
    for step in range(3):
        engine.backward(loss(engine, batch(step)), last=True)
        rates.append(engine.step().lr)
    assert rates == [1.0, 1.0, 0.5]


def test_bf16_at_stage_1_skips_forgets_and_resumes_like_the_rest() -> None:
    """It has an optimiser class of its own in DeepSpeed."""
    net, engine = engine_of(SLOW_TO_MAKE)
    other, untouched = engine_of(SLOW_TO_MAKE)
    engine.backward(loss(engine, batch(8)), last=False)
    engine.backward(loss(engine, batch(9)), last=True)
    engine.zero_grad()
    train(engine, range(2))
    engine.backward(loss(engine, batch(7), float("nan")), last=True)
    assert not engine.step().updated
    train(untouched, range(2))
    assert same(weights(net) | engine.state_dict(), weights(other) | untouched.state_dict())
    resumed_net, resumed = engine_of(SLOW_TO_MAKE)
    put(resumed_net, weights(net))
    resumed.load_state_dict(engine.state_dict())
    train(resumed, range(2, 4))
    train(untouched, range(2, 4))
    assert same(weights(resumed_net) | resumed.state_dict(), weights(other) | untouched.state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(precision="bf16", zero_stage=0), "Use zero_stage 1"),
        (EngineConfig(zero_stage=1, offload_optimizer=True), "Use zero_stage 2"),
        (EngineConfig(zero_stage=2, offload_weights=True), "Use zero_stage 3"),
        (EngineConfig(device="cpu", raw={"zero_optimization": {"stage": 2}}), "set engine.zero_stage instead"),
        (EngineConfig(kind="local", raw={"steps_per_print": 1}), "Remove one of them"),
        (EngineConfig(kind="local", device="cuda:9"), "no CUDA device"),
    ],
)
def test_what_would_train_wrongly_is_refused(config: EngineConfig, message: str) -> None:
    if "CUDA" in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(VelaturaError, match=message):
        make_engine(new_net(), config, OptimizerConfig(lr=1.0))


class Blocks(nn.Module):
    """What a transformer looks like from outside: matrices in a list of blocks, and others around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(self.first(x) if block is self.blocks[0] else x))
        return x


MUON = OptimizerConfig(lr=1e-2, kind="muon", matrix_lr=0.1, schedule="linear", total=4)


def test_muon_turns_the_matrices_of_the_blocks_by_orthogonal_steps_and_leaves_the_rest_to_adamw() -> None:
    plain, net = Blocks(), Blocks()
    for module, config in ((plain, replace(MUON, kind="adamw")), (net, MUON)):
        engine = make_engine(module, CONFIGS["local"], config)
        engine.backward(loss(engine, batch(0)), last=True)
        engine.step()
    step = (net.blocks[0].weight - Blocks().blocks[0].weight) / -0.1
    singular = torch.linalg.svdvals(step.detach())
    assert singular[:-1].min() > 0.5, "all directions move alike, whatever the size of the gradient in them"
    assert singular.max() < 1.3
    for name in ("first.weight", "first.bias", "blocks.0.bias"):
        assert torch.equal(net.get_parameter(name), plain.get_parameter(name)), name


def test_muon_resumes_bit_for_bit_and_follows_the_schedule(tmp_path: Path) -> None:
    whole = make_engine(Blocks(), CONFIGS["local"], MUON)
    train(whole, range(4))
    first = make_engine(Blocks(), CONFIGS["local"], MUON)
    train(first, range(2))
    sections = {"policy": first.module.state_dict(), "optimizer": first.state_dict()}
    saved = load_checkpoint(save_checkpoint(tmp_path, 2, sections, {}, keep=1))
    resumed = make_engine(Blocks(), CONFIGS["local"], MUON)
    resumed.module.load_state_dict(saved.tensors["policy"])
    resumed.load_state_dict(saved.tensors["optimizer"])
    train(resumed, range(2, 4))
    assert same(weights(resumed.module), weights(whole.module))
    assert same(resumed.state_dict(), whole.state_dict())
    before = weights(resumed.module)
    train(resumed, range(4, 5))
    assert same(weights(resumed.module), before), "after the last update of a linear schedule both rates are 0"


def test_muon_is_refused_where_it_has_nothing_to_do_or_no_whole_matrices() -> None:
    with pytest.raises(VelaturaError, match="no matrix to train inside a block"):
        make_engine(new_net(), CONFIGS["local"], MUON)
    with pytest.raises(VelaturaError, match=r"engine\.kind to 'local'"):
        make_engine(Blocks(), CONFIGS["zero-1"], MUON)


def test_a_model_without_trained_parameters_is_refused() -> None:
    for config in (CONFIGS["local"], CONFIGS["zero-1"]):
        with pytest.raises(VelaturaError, match="nothing to train"):
            make_engine(new_net().requires_grad_(False), config, OptimizerConfig(lr=1.0))


def test_raw_settings_reach_deepspeed() -> None:
    config = EngineConfig(device="cpu", raw={"zero_optimization": {"reduce_bucket_size": 17}})
    engine = make_engine(new_net(), config, OptimizerConfig(lr=1e-2))
    assert engine.module.zero_reduce_bucket_size() == 17
    assert engine.module.zero_optimization_stage() == 1
    train(engine, range(1))


FRESH_PROCESS = """
import gc, sys, torch
from velatura.core.engine import *

def train(**config):
    engine = make_engine(torch.nn.Linear(1, 1), EngineConfig(device="cpu", **config), OptimizerConfig(lr=1.0))
    engine.backward(engine.module(torch.ones(1, 1)).sum(), last=True)
    engine.step()

class Spy:
    def find_spec(self, name, path=None, target=None):
        print("imports", name)

train(kind="local")
print("deepspeed is loaded:", "deepspeed" in sys.modules)
gc.disable()
train(zero_stage=1)
sys.meta_path.insert(0, Spy())
print("collected:", gc.collect() > 0)
sys.meta_path.pop(0)
"""


def test_a_process_loads_deepspeed_only_to_use_it_and_may_collect_an_engine_while_it_imports() -> None:
    """Python 3.11 fails when the collector imports amid an import, so collecting an engine must import nothing."""
    run = subprocess.run([sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["deepspeed is loaded: False", "collected: True"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "'cuda', but torch sees no CUDA device. Use 'auto' or 'cpu'"),
        ("xpu", "'xpu', which cannot be used here: .*XPU"),
        ("gpu", "'gpu', which cannot be used here: .*Use 'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_a_device_that_is_not_here_is_refused(name: str, message: str) -> None:
    if getattr(torch, name, None) and getattr(torch, name).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(VelaturaError, match=f"engine.device is {message}"):
        choose_device(name)


@pytest.mark.skipif(torch.xpu.is_available(), reason="it can compute here")
def test_a_precision_is_refused_for_what_the_device_itself_says() -> None:
    with pytest.raises(VelaturaError, match=r"'bf16', which device 'xpu' cannot compute \(.*XPU.*Set it to 'fp32'"):
        check_precision(torch.device("xpu"), "bf16")


def test_bf16_is_refused_where_the_device_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("not implemented for 'BFloat16'")

    check_precision(torch.device("cpu"), "bf16")
    monkeypatch.setattr(torch, "ones", refuse)
    check_precision(torch.device("cpu"), "fp32")
    with pytest.raises(
        VelaturaError, match=r"'bf16', which device 'cpu' cannot compute \(not implem.*Set it to 'fp32'"
    ):
        engine_of("local-bf16")
