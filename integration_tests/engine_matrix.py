"""Every objective under every engine: the same points, dealt out to one process or to two, and their gradients.

Used by `test_engines` in one process, and by `engine_worker` in two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from velatura.api import GuidancePolicy, Kernel, PolicyObjective, Prompt
from velatura.core.encoding import Encoder
from velatura.core.engine import Engine, EngineConfig, OptimizerConfig, make_engine
from velatura.core.learner import Learner, Tally
from velatura.core.points import Group, MicroBatch, PointNoise, forward_points, trajectory_points
from velatura.core.policy import CURRENT, Policy
from velatura.core.rollout import Chunk, Sampler, rollout
from velatura.core.types import StepPlan
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter, TinyWorldAdapterOptions
from velatura.plugins.distillers.velocity_match import VelocityMatch
from velatura.plugins.guidance.policies import Both, NoGuidance, ScaleOptions, TeacherOnly
from velatura.plugins.objectives.awm import AWM
from velatura.plugins.objectives.flow_grpo import FlowGRPO
from velatura.plugins.objectives.nft import NFT
from velatura.schedulers.kernels import Ode
from velatura.schedulers.stochastic import FlowSde

CPU = torch.device("cpu")
STEPS = 3
OPTIMIZER = OptimizerConfig(lr=1e-3, clip_norm=0.05)
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}}
"""Else ZeRO 3 leaves parameters as small as these where they are, and hides its mistakes."""
ENGINES = {f"zero-{stage}": EngineConfig(zero_stage=stage, device="cpu", threads=1) for stage in (1, 2)} | {
    "zero-3": EngineConfig(zero_stage=3, device="cpu", threads=1, raw=SMALL),
}
DRAWINGS = ("a red circle on green", "a blue square on white", "a black circle on red")
EDIT = "make the circle yellow"
SHARES = {1: [(0, 1, 2, 3)], 2: [(0,), (1, 2, 3)]}
"""Numbers of the prompts of each process: uneven, and only one has the edit."""
GUIDED = ScaleOptions(scale=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An objective, and what it is combined with."""

    objective: PolicyObjective  # type: ignore[type-arg]
    guidance: GuidancePolicy = field(default_factory=NoGuidance)  # type: ignore[type-arg]
    kernel: Kernel = field(default_factory=Ode)  # type: ignore[type-arg]
    prompts: int = 4
    """Of the four; with three, all processes do the same and weights are fetched layer by layer."""


CASES = {
    "nft": Case(objective=NFT(), prompts=3),
    "awm": Case(objective=AWM()),
    "flow-grpo": Case(objective=FlowGRPO(), guidance=Both(GUIDED), kernel=FlowSde()),
    "velocity-match": Case(objective=VelocityMatch(), guidance=TeacherOnly(GUIDED), prompts=3),
}
NETS = {"full": tuple(CASES), "lora": ("nft", "velocity-match")}
"""Kind of network -> its cases. LoRA is trained with gradient checkpointing."""


@cache
def adapter(kind: str) -> TinyWorldAdapter:
    options = {"weights": None, "width": 48, "heads": 3, "layers": 2, "lora_rank": 3 if kind == "lora" else None}
    return TinyWorldAdapter(TinyWorldAdapterOptions.model_validate(options))


def new_net(kind: str) -> nn.Module:
    """Awake: fresh ones answer zero."""
    net, draw = adapter(kind).load(CPU), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    if kind == "lora":
        net.enable_gradient_checkpointing()  # type: ignore[operator]
    return net.train()


@cache
def prompts() -> tuple[Prompt, ...]:
    source = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(4))
    drawn = [Prompt(id=f"t2i/{i}", text=text, task="t2i") for i, text in enumerate(DRAWINGS)]
    return (*drawn, Prompt(id="edit/0", text=EDIT, task="edit", sources=(source,)))


def moved(policy: Policy, by: float) -> dict[str, Tensor]:
    """Other weights of the same shapes."""
    return {name: value + by for name, value in policy.weights().items()}


def draw(net: nn.Module, kind: str, case: Case, prompt: Prompt) -> Chunk:
    """Two samples of a prompt, and where they passed."""
    sampler = Sampler(adapter=adapter(kind), guidance=case.guidance, kernel=case.kernel, steps=STEPS, batch=8)
    plan = StepPlan.training(torch.tensor([0, 1]), steps=STEPS, noise="trained")
    (chunk,) = rollout(net, sampler, [prompt], [[5, 6]], plan, keep_trajectory=True)
    return chunk


@cache
def batches(kind: str, name: str) -> tuple[MicroBatch, ...]:
    """One micro-batch for each prompt, drawn by a network in plain torch."""
    case, net = CASES[name], new_net(kind)
    train, weight, advantages = torch.tensor([0, 1]), torch.ones(STEPS), torch.tensor([1.0, -0.5])
    made = []
    for prompt in prompts()[: case.prompts]:
        with torch.no_grad():
            chunk = draw(net, kind, case, prompt)
        group, times = Group(prompt=prompt, samples=(0, 1), numbers=(0, 1)), adapter(kind).times(STEPS, prompt)
        total = 2 * len(train) * case.prompts
        if case.objective.requires.points == "forward":
            noise = PointNoise(seed=1, step=0, shared=True)
            made.append(forward_points([group], chunk.latents, advantages, times, train, weight, noise, total))
        else:
            assert chunk.trajectory is not None
            points = trajectory_points(
                [group], chunk.trajectory, advantages, times, train, weight, total, case.kernel, chunk.log_prob
            )
            made.append(replace(points, teacher=f"teacher/{prompt.task}"))
    return tuple(made)


def new_learner(kind: str, config: EngineConfig) -> Learner:
    """With an old policy, a reference and teachers that all differ from what is trained."""
    net = new_net(kind)
    policy = Policy(net)
    others = {"old": 0.02, "reference": -0.03, "teacher/t2i": 0.05, "teacher/edit": -0.05}
    sets = {name: moved(policy, by) for name, by in others.items()}
    engine = make_engine(net, config, OPTIMIZER)
    policy.gathered = engine.whole
    for name, tensors in sets.items():
        policy.put(name, tensors, what=name)
    return Learner(
        engine=engine, policy=policy, adapter=adapter(kind), guidance=NoGuidance(), objective=NFT(),
        encoder=Encoder(adapter(kind), CPU),
    )  # fmt: skip


def of_case(learner: Learner, name: str) -> Learner:
    return replace(learner, guidance=CASES[name].guidance, objective=CASES[name].objective)


def own_batches(learner: Learner, kind: str, name: str) -> Sequence[MicroBatch]:
    """This process's share, with idle ones where another has more."""
    engine, every = learner.engine, batches(kind, name)
    mine = [every[i] for i in SHARES[engine.world_size][engine.rank] if i < len(every)]
    return learner.even(mine, lambda: every[0])


def gradients(learner: Learner, kind: str, name: str) -> dict[str, Tensor]:
    """Of one objective, over all processes."""
    case = of_case(learner, name)
    case.accumulate_all(own_batches(case, kind, name), Tally())
    found = dict(case.engine.gradients())
    case.engine.zero_grad()
    return found


def weights(engine: Engine, policy: Policy) -> dict[str, Tensor]:
    with engine.whole():
        return {name: value.clone() for name, value in policy.weights().items()}


def check_rollouts(learner: Learner, kind: str) -> None:
    """As many as each process likes, from several weight sets, equal those in plain torch."""
    engine, case = learner.engine, CASES["flow-grpo"]
    plain = Policy(new_net(kind))
    plain.put("old", moved(plain, 0.02), what="old")
    with learner.policy.gathered():
        for worn in (CURRENT, "old") if engine.rank == 0 else (CURRENT,):
            for prompt in prompts()[: 3 - engine.rank]:
                with learner.policy.wearing(worn) as net, plain.wearing(worn) as expected:
                    got, wanted = (draw(which, kind, case, prompt).latents for which in (net, expected))
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def results(config: EngineConfig, kind: str) -> Mapping[str, Mapping[str, Tensor]]:
    """Gradients of every case, twice to see that nothing is left over, and weights after a step."""
    learner = new_learner(kind, config)
    if kind == "full":
        check_rollouts(learner, kind)
    found = {name: gradients(learner, kind, name) for name in NETS[kind]}
    again = gradients(learner, kind, "nft")
    assert all(torch.equal(again[name], value) for name, value in found["nft"].items())
    case = of_case(learner, "nft")
    case.learn(own_batches(case, kind, "nft"))
    return found | {"updated": weights(learner.engine, learner.policy)}
