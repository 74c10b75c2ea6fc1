"""A small real network of the embedded world, awake (fresh ones answer zero), and prompts for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import nn

from velatura.api import GuidancePolicy, Prompt
from velatura.core.encoding import Encoder
from velatura.core.engine import EngineConfig, OptimizerConfig, make_engine
from velatura.core.learner import Learner
from velatura.core.policy import Policy
from velatura.core.rollout import Sampler
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter, TinyWorldAdapterOptions
from velatura.plugins.guidance.policies import NoGuidance
from velatura.plugins.objectives.nft import NFT
from velatura.schedulers.kernels import Ode

CPU = torch.device("cpu")
COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def adapter() -> TinyWorldAdapter:
    small = {"weights": None, "width": 48, "heads": 3, "layers": 2}
    return TinyWorldAdapter(TinyWorldAdapterOptions.model_validate(small))


@pytest.fixture(scope="session")
def wake() -> Callable[[nn.Module], nn.Module]:
    """Fresh networks answer zero; an awake one answers something."""

    def add_noise(net: nn.Module) -> nn.Module:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
        return net

    return add_noise


@pytest.fixture(scope="session")
def original(adapter: TinyWorldAdapter, wake: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return wake(adapter.load(CPU))


@pytest.fixture
def net(original: nn.Module) -> nn.Module:
    return copy.deepcopy(original)


@pytest.fixture
def drawings() -> Callable[[int], list[Prompt]]:
    def make(count: int) -> list[Prompt]:
        texts = [f"a {COLOURS[i % 6]} circle on {COLOURS[(i + 1 + i // 6) % 6]}" for i in range(count)]
        return [Prompt(id=f"draw/{i}", text=text, task="t2i") for i, text in enumerate(texts)]

    return make


@pytest.fixture
def edits() -> Callable[[int], list[Prompt]]:
    def make(count: int) -> list[Prompt]:
        draw = torch.Generator().manual_seed(4)
        return [
            Prompt(
                id=f"edit/{i}",
                text=f"make the circle {COLOURS[i % 6]}",
                task="edit",
                sources=(torch.rand(3, 24, 24, generator=draw),),
            )
            for i in range(count)
        ]

    return make


@pytest.fixture
def sampler(adapter: TinyWorldAdapter) -> Callable[..., Sampler]:
    def make(guidance: GuidancePolicy | None = None, **options: object) -> Sampler:
        settings = {"kernel": Ode(), "steps": 3, "batch": 64} | options
        return Sampler(adapter=adapter, guidance=guidance or NoGuidance(), **settings)

    return make


@pytest.fixture
def learner(adapter: TinyWorldAdapter, net: nn.Module) -> Callable[..., Learner]:
    """A learner in plain torch, with an old policy and a reference that equal the current one."""

    def make(
        objective: object = None, guidance: GuidancePolicy | None = None, module: nn.Module | None = None
    ) -> Learner:
        policy = Policy(module or net)
        for name in ("old", "reference"):
            policy.remember(name)
        engine = make_engine(policy.net, EngineConfig(kind="local", device="cpu"), OptimizerConfig(lr=1e-3))
        return Learner(
            engine=engine,
            policy=policy,
            adapter=adapter,
            guidance=guidance or NoGuidance(),
            objective=objective or NFT(),
            encoder=Encoder(adapter, engine.device),
        )

    return make


@pytest.fixture
def forwards() -> Callable[[nn.Module], list[int]]:
    """Counts: rows of each forward of a network from now on, without those that only prepare prefixes."""

    def watch(module: nn.Module) -> list[int]:
        rows: list[int] = []

        def note(_: nn.Module, __: Sequence[object], options: dict[str, object]) -> None:
            if options["kv_cache_mode"] != "extract":
                rows.append(len(options["hidden_states"]))  # type: ignore[arg-type]

        module.register_forward_pre_hook(note, with_kwargs=True)
        return rows

    return watch
