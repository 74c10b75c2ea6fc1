"""What a stage needs is estimated, and compared with the bytes of a real run: counted, and seen by the allocator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from velatura.api import Context, ModelAdapter, Prompt, Role
from velatura.core.build import build
from velatura.core.check import check, set_up
from velatura.core.encoding import Encoder
from velatura.core.engine import EngineConfig, OptimizerConfig, make_engine
from velatura.core.footprint import Batch, Rehearsal
from velatura.core.ghost import Live
from velatura.core.learner import Learner
from velatura.core.memory import MemoryPlan, Part, Sharding, chunk, engine_parts, larger, micro_batch, set_parts
from velatura.core.pipeline import plan_run
from velatura.core.placement import Placement, advice
from velatura.core.points import MicroBatch
from velatura.core.policy import Policy
from velatura.core.recipe import Ref
from velatura.core.registry import Registry
from velatura.core.rollout import Sampler, rollout
from velatura.core.types import Points
from velatura.plugins.guidance.policies import NoGuidance, RolloutOnly
from velatura.plugins.objectives.nft import NFT
from velatura.schedulers.kernels import Ode

FAMILIES = Path(__file__).parents[1] / "adapters" / "families"
TINY = Path(__file__).parents[2] / "integration_tests" / "recipes" / "tiny.yaml"
CPU = torch.device("cpu")
CLOSE = 0.15
"""The error that an estimate may have."""
N, P = 8, 2
"""Points and prompts of a micro-batch."""
DRAWING = Prompt(id="p", text="a red circle on white", task="t2i")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(FAMILIES))
    import qwen_image_21

    return qwen_image_21.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def adapter_of(folder: Path, tmp_path: Path) -> Callable[..., ModelAdapter[Any]]:
    def make(use: str, precision: str = "fp32", **options: Any) -> ModelAdapter[Any]:
        own = {"path": str(folder), "height": 128, "width": 128} if use == "qwen-image-21" else {}
        made: Any = build(Registry.discover(), "adapter", Ref.model_validate({"use": use, "with": {**own, **options}}))
        made.setup(Context(device=CPU, cache=tmp_path / "cache", seed=0, base=tmp_path, precision=precision))
        return made

    return make


@dataclass
class Run:
    """A learner as a stage makes it, and what was counted while it was made."""

    learner: Learner
    shape: tuple[int, ...]
    live: Live
    prompts: list[Prompt]

    def micro_batch(self) -> MicroBatch:
        t, even = torch.full((N,), 0.5), torch.ones(N) / N
        x, x0, target = (torch.randn(N, *self.shape) for _ in range(3))
        points = Points(x=x, t=t, advantage=torch.randn(N), weight=even, x0=x0, target=target)
        return MicroBatch(prompts=tuple(self.prompts), rows=torch.arange(N) * P // N, points=points)


def real(adapter: ModelAdapter[Any], precision: str = "fp32", **engine: Any) -> Run:
    """The engine, policy and roles of a stage of reinforcement learning, after a first update."""
    net, live = adapter.load(CPU), Live()
    config = EngineConfig(**{"kind": "local", "device": "cpu", "precision": precision, **engine})
    with live:
        policy = Policy(net)
        made = make_engine(net, config, OptimizerConfig(lr=1e-3))
        policy.remember("old")
        policy.remember("reference", follows=False)
        encoder = Encoder(adapter, made.device)
        learner = Learner(
            engine=made, policy=policy, adapter=adapter, guidance=NoGuidance(), objective=NFT(), encoder=encoder
        )
        prompts = [Prompt(id=f"p{i}", text=DRAWING.text, task="t2i") for i in range(P)]
        run = Run(learner, tuple(adapter.noise([DRAWING], [0]).shape[1:]), live, prompts)
        learner.learn([run.micro_batch(), run.micro_batch()])
    return run


def counted(tensors: Any) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def rehearsal_of(adapter: ModelAdapter[Any], precision: str = "fp32", solid: bool | None = False) -> Rehearsal:
    found = adapter.footprint(DRAWING)
    assert found is not None
    return Rehearsal(adapter, found, DRAWING, torch.bfloat16 if precision == "bf16" else torch.float32, solid=solid)


def near(estimate: int, found: int) -> bool:
    """Within 15 % of what was found; prints the error for whoever reads the output."""
    print(f"estimate {estimate:,}, found {found:,}: {estimate / found - 1:+.1%}")
    return abs(estimate / found - 1) <= CLOSE


@pytest.mark.parametrize(("side", "counts"), [(128, True), (1024, False)])
def test_a_small_network_is_run_with_numbers_on_small_pictures_alone(
    side: int, counts: bool, adapter_of: Callable[..., ModelAdapter[Any]]
) -> None:
    rehearsal = rehearsal_of(adapter_of("qwen-image-21", height=side, width=side, lora_rank=2), solid=None)
    assert isinstance(rehearsal.ghost.tensor(1), FakeTensor) is not counts


QWEN = [
    pytest.param(
        "qwen-image-21", {"lora_rank": rank, "gradient_checkpointing": again}, id=f"lora {rank}, again {again}"
    )
    for rank in (None, 4)
    for again in (False, True)
]
TINYWORLD = [
    pytest.param("tinyworld", {"weights": None, "width": 48, "layers": 5, "lora_rank": rank}, id=f"tinyworld {rank}")
    for rank in (None, 4)
]


@pytest.mark.parametrize(("use", "options"), QWEN + TINYWORLD)
def test_what_an_engine_and_its_roles_keep_is_counted(
    use: str, options: dict[str, Any], adapter_of: Callable[..., ModelAdapter[Any]]
) -> None:
    adapter = adapter_of(use, **options)
    rehearsal, run = rehearsal_of(adapter), real(adapter)
    plan = MemoryPlan.of(engine_parts(rehearsal.net, rehearsal.weights, Sharding(), "adamw"))
    learner = run.learner
    learner.accumulate(run.micro_batch(), __import__("velatura.core.learner", fromlist=["Tally"]).Tally(), last=True)
    net, engine = learner.policy.net, learner.engine
    gradients = counted(p.grad for p in net.parameters() if p.grad is not None)
    assert near(plan.part("transformer weights").size or 0, counted([*net.parameters(), *net.buffers()]))
    assert near(plan.part("gradients").size or 0, gradients)
    states = [state for updater, *_ in engine._optimizers for state in updater.state.values()]  # type: ignore[attr-defined]
    assert near(plan.part("moments of adamw").size or 0, counted(t for state in states for t in state.values()))
    trained, kept = sum(rehearsal.trained.values()), {"old": True, "reference": False}
    for part in set_parts(trained, rehearsal.loaded, kept, [], whole=learner.policy.whole)[:2]:
        own = learner.policy.sets[part.name.removeprefix("weights of role ")].values()
        assert near(part.size or 0, counted(own))
        assert part.where == ("CPU" if options["lora_rank"] is None else "GPU")
    assert plan.part("masters in fp32").size == 0


@pytest.mark.parametrize(("use", "options"), QWEN + TINYWORLD)
def test_the_most_an_update_needs_is_that_of_a_real_one(
    use: str, options: dict[str, Any], adapter_of: Callable[..., ModelAdapter[Any]]
) -> None:
    adapter = adapter_of(use, **options)
    rehearsal, run = rehearsal_of(adapter), real(adapter)
    gradients = 4 * sum(rehearsal.trained.values())
    estimate = rehearsal.update(Batch(points=N, prompts=P, limit=2 * N), NoGuidance(), NFT()) + gradients
    with run.live:
        began = run.live.begin()
        run.learner.learn([run.micro_batch() for _ in range(2)])
        most = run.live.peak - began
    assert near(estimate, most)


def test_the_allocator_sees_the_same_peak(adapter_of: Callable[..., ModelAdapter[Any]]) -> None:
    """Not our own count: torch's profiler records every block that the CPU's allocator hands out and takes back."""
    adapter = adapter_of("tinyworld", weights=None, width=48, layers=5)
    rehearsal, run = rehearsal_of(adapter), real(adapter)
    gradients = 4 * sum(rehearsal.trained.values())
    estimate = rehearsal.update(Batch(points=N, prompts=P, limit=2 * N), NoGuidance(), NFT()) + gradients
    batches = [run.micro_batch() for _ in range(2)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.learner.learn(batches)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert near(estimate, most)


def saved_bytes(net: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that a forward keeps for its backward, parameters excepted."""
    own = {id(p.untyped_storage()) for p in net.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("use", "options"), [*QWEN[::2], TINYWORLD[0]])
def test_a_ghost_keeps_for_the_backward_what_a_network_keeps(
    use: str, options: dict[str, Any], adapter_of: Callable[..., ModelAdapter[Any]]
) -> None:
    adapter = adapter_of(use, **options)
    rehearsal, net = rehearsal_of(adapter), adapter.load(CPU)
    cond, rows, t = adapter.encode([DRAWING] * P), torch.arange(N) * P // N, torch.full((N,), 0.5)
    x = torch.randn(N, *rehearsal.shape)
    found = saved_bytes(net, lambda: adapter.velocity(net, x, t, adapter.prepare(net, cond), rows))
    ghost, whole, told = rehearsal.ghost.tensor(N, *rehearsal.shape), rehearsal.net, rehearsal.footprint.cond(P)
    with Live():  # which also knows what to do with masks
        estimate = saved_bytes(
            whole, lambda: adapter.velocity(whole, ghost, t, adapter.prepare(whole, told), rows)
        )  # fmt: skip
    assert near(estimate, found)


def test_a_rollout_and_its_pictures_need_what_they_are_said_to(adapter_of: Callable[..., ModelAdapter[Any]]) -> None:
    adapter = adapter_of("qwen-image-21", lora_rank=4)
    rehearsal, run = rehearsal_of(adapter), real(adapter)
    guidance = RolloutOnly()
    forward = rehearsal.rollout(Batch(points=N, prompts=P, limit=2 * N), guidance, Role.ROLLOUT)
    frozen = rehearsal.footprint.frozen["vae"]
    decoding = rehearsal.decode(N, torch.float32)
    sampler = Sampler(adapter=adapter, guidance=guidance, kernel=Ode(), steps=2, batch=2 * N)
    decode = type(adapter).decode
    peaks = []

    def decoded(*given: Any, **more: Any) -> Tensor:
        peaks.append(run.live.peak - began)
        run.live.begin()
        pictures = decode(adapter, *given, **more)
        peaks.append(run.live.peak - began)
        return pictures

    adapter.decode = decoded  # type: ignore[method-assign]
    adapter.null([DRAWING])
    with run.live, run.learner.policy.wearing("old") as net:
        began = run.live.begin()
        list(rollout(net, sampler, run.prompts, [list(range(N // P))] * P, encoder=run.learner.encoder))
    assert near(forward, peaks[0])
    assert near(decoding or 0, peaks[1])
    assert frozen == counted(adapter.pipe.vae.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2])
def test_deepspeed_needs_what_it_is_said_to(
    zero: int, precision: str, adapter_of: Callable[..., ModelAdapter[Any]]
) -> None:
    adapter = adapter_of("qwen-image-21", precision, lora_rank=None)
    rehearsal = rehearsal_of(adapter, precision)
    run = real(adapter, precision, kind="deepspeed", zero_stage=zero)
    sharding = Sharding(kind="deepspeed", zero_stage=zero, precision=precision)
    plan = MemoryPlan.of(engine_parts(rehearsal.net, rehearsal.weights, sharding, "adamw"))
    used = sum(part.size or 0 for part in plan.parts if part.where != "GPU" and "update" in part.phases)
    sets = 2 * 4 * sum(rehearsal.trained.values())
    assert near(plan.during("encode") + sets, run.live.now)  # at rest
    estimate = rehearsal.update(Batch(points=N, prompts=P, limit=2 * N), NoGuidance(), NFT()) + used
    with run.live:
        began = run.live.begin()
        run.learner.learn([run.micro_batch() for _ in range(2)])
        most = run.live.peak - began
    assert near(estimate, most)
    owner = run.learner.engine._engine.optimizer  # type: ignore[attr-defined]
    whole = zero == 1 and precision == "bf16"
    masters = owner.fp32_groups_flat_partition if whole else owner.single_partition_of_fp32_groups
    assert near(plan.part("masters in fp32").size or 0, counted(masters))
    if whole:
        assert plan.part("gradients").where == "GPU"
        assert near(plan.part("gradients").size or 0, counted(owner.fp32_groups_gradients_flat))
    states = owner.optimizer.state.values()
    assert near(plan.part("moments of adamw").size or 0, counted(t for state in states for t in state.values()))


def test_zero_divides_what_its_stage_divides() -> None:
    net = nn.Linear(1000, 1000, bias=False)
    count, world = 1_000_000, 8

    def plan_of(stage: int, *, offload: bool = False) -> MemoryPlan:
        sharding = Sharding(kind="deepspeed", zero_stage=stage, world_size=world, precision="bf16",
                            offload_optimizer=offload, offload_weights=offload)  # fmt: skip
        return MemoryPlan.of(engine_parts(net, 2 * count, sharding, "adamw"), world)

    one, two, three = ({part.name: part.size or 0 for part in plan_of(stage).parts} for stage in (1, 2, 3))
    assert [each["transformer weights"] for each in (one, two, three)] == [2 * count, 2 * count, 2 * count // world]
    assert [each["gradients"] for each in (one, two, three)] == [4 * count, 4 * count // world, 4 * count // world]
    for each in (one, two, three):
        assert each["masters in fp32"] == 4 * count // world
        assert each["moments of adamw"] == 8 * count // world
    shares = (2 + 4 + 8) * count // world  # weights, masters, moments
    assert plan_of(3).during("rollout") == shares + 2 * count, "rollouts have all weights beside the shares"
    assert plan_of(3, offload=True).during("rollout") == 2 * count
    assert plan_of(3, offload=True).during("update") == plan_of(3).part("gradients on their way").size


def test_muon_keeps_one_moment_of_a_matrix() -> None:
    net = nn.Module()
    net.blocks = nn.ModuleList([nn.Linear(64, 64)])
    plan = MemoryPlan.of(engine_parts(net, 0, Sharding(), "muon"))
    assert plan.part("moments of muon").size == 4 * 64 * 64 + 8 * 64


def test_the_peak_is_the_largest_phase_and_the_cpu_does_not_count() -> None:
    parts = [
        Part(name="a", size=10),
        Part(name="b", size=5, phases=("rollout",)),
        Part(name="c", size=7, phases=("update",)),
        Part(name="teacher", size=100, where="CPU"),
        Part(name="nothing", size=0),
    ]
    plan = MemoryPlan.of(parts)
    assert (plan.peak, plan.phase, plan.unknown) == (17, "update", ())
    assert len(plan.parts) == 4
    other = MemoryPlan.of([Part(name="b", size=9, phases=("rollout",)), Part(name="d", size=None)])
    both = larger(plan, other)
    assert (both.peak, both.phase, both.unknown) == (19, "rollout", ("d",))


def test_batches_are_those_that_the_stages_make() -> None:
    assert (chunk(16, 16, 64, guided=True).points, chunk(16, 16, 64, guided=False).prompts) == (32, 4)
    assert chunk(16, 24, 8, guided=True).points == 24  # a group is never split
    most = micro_batch(DRAWING, prompts=4, group=4, points=2, limit=16)
    assert (most.points, most.prompts) == (16, 2)
    assert micro_batch(DRAWING, prompts=4, group=4, points=8, limit=1).points == 8  # nor are a sample's points


def test_more_gpus_need_less_each_and_unknown_is_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    plan = plan_run(TINY, ["engine.kind=deepspeed", "engine.zero_stage=2", "engine.device=cuda"])
    stage: Any = plan.recipe.stage("teacher_t2i")
    adapter = set_up(plan, "adapter", stage.adapter)
    look = lambda ref, split: set_up(plan, "task", ref).prompts(split)  # noqa: E731
    one, eight = (Placement(plan.recipe, plan.registry, n).plan("teacher_t2i", adapter, look) for n in (1, 8))
    assert one is not None and eight is not None
    moments = one.part("moments of adamw").size or 0
    assert eight.part("moments of adamw").size == -(-moments // 8)
    assert eight.peak < one.peak
    said = advice(one, 1000, stage, Placement(plan.recipe, plan.registry).sharding)
    assert "which has 0.0 MB" in said and "engine.precision bf16" in said
    adapter.footprint = lambda prompt: None
    assert Placement(plan.recipe, plan.registry).plan("teacher_t2i", adapter, look) is None
    check(plan, Console(width=180), 8)
    shown = capsys.readouterr().out
    assert "Memory of student" in shown and "each of 8 GPUs" in shown
    assert "teacher t2i" in shown and "the weights that are worn" in shown
