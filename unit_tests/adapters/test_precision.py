"""What is bf16 and what stays fp32, and options that let other arithmetic compute the same network."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import isgenerator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from velatura.api import Prompt, VelaturaError
from velatura.core.encoding import Encoder
from velatura.core.engine import EngineConfig, OptimizerConfig, make_engine
from velatura.core.engine.local import LocalEngine
from velatura.core.errors import SelfCheckError
from velatura.core.learner import Learner
from velatura.core.pipeline import run_pipeline
from velatura.core.points import Group, MicroBatch, PointNoise, forward_points
from velatura.core.policy import Policy
from velatura.core.selfcheck import self_check
from velatura.plugins.adapters.qwen_image_21 import QwenImage21
from velatura.plugins.adapters.sd3 import SD3
from velatura.plugins.guidance.policies import NoGuidance
from velatura.plugins.objectives.nft import NFT
from velatura.rewards.advantages import GroupZ
from velatura.schedulers.kernels import Ode

Make = Callable[..., Any]
CPU = torch.device("cpu")
PROMPTS = [Prompt(id="p", text="a red fox", task="t2i"), Prompt(id="q", text="two birds", task="t2i")]
FAMILIES = {"qwen_image_21": QwenImage21, "sd3": SD3}
ENGINES = {"local": {"kind": "local"}, "zero-1": {"kind": "deepspeed", "zero_stage": 1}}
BRIGHT = """
import torch
from velatura.api import NoOptions, RewardModel, Scores, hookimpl

class Brightness(RewardModel[NoOptions]):
    '''Mean of all pixels.'''

    name = "brightness"

    def score(self, samples):
        return Scores.of(torch.stack([sample.image.mean() for sample in samples]))

@hookimpl
def velatura_reward():
    return [Brightness]
"""


def train(place: Path, family: str, model: Path, engine: dict[str, Any], **options: Any) -> dict[str, float]:
    """One step of reinforcement learning by the whole command; its metrics."""
    (place / "bright.py").write_text(BRIGHT)
    (place / "t2i.jsonl").write_text("\n".join(json.dumps({"prompt": p.text}) for p in PROMPTS))
    size = {"height": 32, "width": 32} if family == "sd3" else {"height": 64, "width": 64}
    name = import_module(family).ADAPTER
    (place / "recipe.yaml").write_text(yaml.safe_dump({
        "output": str(place / "run"), "plugins": ["./bright.py"],
        "engine": {"threads": 1, "device": "cpu", **engine},
        "adapter": {"use": name, "with": {"path": str(model), "lora_rank": 2, **size, **options}},
        "sampling": {"steps": 2, "batch": 8},
        "guidance": {"use": "rollout-only", "with": {"scale": 2.0}},
        "stages": {"teacher": {
            "stage": "rl", "task": {"use": "prompts", "with": {"file": "t2i.jsonl"}}, "rewards": ["bright/brightness"],
            "steps": 1, "prompts_per_step": 2, "group_size": 3,
        }},
    }))  # fmt: skip
    run = run_pipeline(place / "recipe.yaml")
    (line,) = (run / "teacher" / "metrics.jsonl").read_text().splitlines()
    metrics: dict[str, float] = json.loads(line)
    return metrics


class Seen:
    """Types of the tensors that went by, by what they are."""

    def __init__(self) -> None:
        self.types: dict[str, set[torch.dtype]] = defaultdict(set)

    def note(self, what: str, *values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.types[what].add(value.dtype)

    def spy(self, patch: pytest.MonkeyPatch, owner: type, name: str, what: Callable[..., Iterator[Any]]) -> None:
        """Note what `what` (result, arguments) yields of every call: pairs of a name and a tensor."""
        original = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            result = list(result) if isgenerator(result) else result
            for label, value in what(result, *arguments, *named.values()):
                self.note(label, value)
            return result

        patch.setattr(owner, name, call)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watches everything of a step that has a type."""
    found = Seen()

    def step(result: Any, _: Any, v: Tensor, x: Tensor, t: Tensor, after: Tensor) -> Iterator[Any]:
        yield from (("kernel", each) for each in (v, x, t, after, result.mean, result.std))

    def loss(result: Any, _: Any, points: Any, velocity: Any) -> Iterator[Any]:
        named = ("x", "t", "advantage", "weight", "x0", "target")
        yield from (("points", getattr(points, name)) for name in named)
        yield from (("velocity by role", v) for v in velocity.values())
        yield "loss", result.value

    def velocity(result: Tensor, _: Any, __: Any, x: Tensor, t: Tensor, *___: Any) -> Iterator[Any]:
        yield from (("x", x), ("t", t), ("velocity", result))

    def engine(result: Any, self: Any, module: nn.Module, *_: Any) -> Iterator[Any]:
        yield from (("weights", p) for p in module.parameters())

    def gradients(result: Any, *_: Any) -> Iterator[Any]:
        yield from (("gradients", gradient) for _, gradient in result)

    found.spy(monkeypatch, Ode, "step", step)
    found.spy(monkeypatch, NFT, "loss", loss)
    found.spy(monkeypatch, GroupZ, "estimate", lambda result, *_: iter([("advantages", result.values)]))
    from velatura.core.engine.deepspeed import DeepSpeedEngine

    for kind in (LocalEngine, DeepSpeedEngine):
        found.spy(monkeypatch, kind, "__init__", engine)
        found.spy(monkeypatch, kind, "gradients", gradients)
    for family in FAMILIES.values():
        found.spy(monkeypatch, family, "velocity", velocity)
        found.spy(monkeypatch, family, "decode", lambda result, *_: iter([("pictures", result)]))
        found.spy(monkeypatch, family, "row", lambda row, *_: (("rows", value) for value in row.values()))

        def parts(result: Any, adapter: Any, *_: Any) -> Iterator[Any]:
            modules = [m for m in adapter.pipe.components.values() if isinstance(m, nn.Module)]
            yield from (("frozen parts", p) for module in modules for p in module.parameters())

        found.spy(monkeypatch, family, "latent_shape", parts)
    return found


FP32 = ("kernel", "points", "velocity by role", "loss", "x", "t", "velocity", "advantages", "pictures", "gradients")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("precision", "engine"), [("bf16", "local"), ("bf16", "zero-1"), ("fp32", "local")])
def test_the_types_of_everything_in_a_step_of_reinforcement_learning(
    precision: str, engine: str, family: str, tiny: Make, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    metrics = train(tmp_path, family, tiny(family), {**ENGINES[engine], "precision": precision})
    assert metrics["updated"] == 1
    assert metrics["grad_norm"] > 0
    network = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = {name: {torch.float32} for name in FP32}
    expected |= {name: {network} for name in ("weights", "frozen parts", "rows")}
    assert dict(seen.types) == expected


def wake(net: nn.Module) -> nn.Module:
    """Fresh LoRA weights add nothing."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=draw).to(p))
    return net


def learned(adapter: Any, net: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients at two points of one prompt."""
    x, t, rows = adapter.noise(PROMPTS[:1] * 2, [1, 2]), torch.tensor([0.7, 0.3]), torch.zeros(2, dtype=torch.int64)
    v = adapter.velocity(net, x, t, adapter.prepare(net, adapter.encode(PROMPTS[:1])), rows)
    loss = (v - x).square().mean()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"attention": "native"}], ids=str)
def test_checkpointing_and_torchs_own_attention_change_neither_loss_nor_gradient(
    options: dict[str, Any], family: str, precision: str, opened: Make
) -> None:
    plain, other = opened(family, precision, lora_rank=2), opened(family, precision, lora_rank=2, **options)
    expected, found = (learned(adapter, wake(adapter.load(CPU))) for adapter in (plain, other))
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert sum(float(g.abs().sum()) for g in expected[1].values()) > 0
    assert all(torch.equal(found[1][name], g) for name, g in expected[1].items())


def test_checkpointing_runs_the_blocks_again_in_the_backward_pass(opened: Make) -> None:
    for options, times in (({}, 1), ({"gradient_checkpointing": True}, 2)):
        adapter = opened("sd3", lora_rank=2, **options)
        net, calls = adapter.load(CPU), []
        net.transformer_blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        learned(adapter, net)
        assert len(calls) == times


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flesh", r"no attention back-end 'flesh'\. Did you mean 'flash'\? There is: .*native, sage"),
        ("flash", r"back-end 'flash' cannot train this network on 'cpu' in torch\.float32: .*install .flash-attn"),
    ],
)
def test_an_attention_back_end_that_cannot_be_had_is_refused(name: str, message: str, opened: Make) -> None:
    with pytest.raises(VelaturaError, match=message):
        opened("sd3", attention=name).load(CPU)


@pytest.fixture
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """torch.compile without the minutes that its code generator takes: dynamo's and autograd's graphs, run as they
    are. Names the classes that were compiled; where torch would give up, as too much is compiled, it is an error."""
    compiled: list[str] = []
    original = torch.compile

    def compile_it(forward: Any, **options: Any) -> Any:
        compiled.append(type(forward.__self__).__name__)
        return original(forward, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_it)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        yield compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize(
    ("family", "options", "blocks"),
    [
        ("sd3", {}, ["JointTransformerBlock"] * 2),
        ("qwen_image_21", {}, ["QwenImage21TransformerBlock"] * 2),
        ("flux", {"text_tokens": 16, "true_cfg": True}, ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
    ],
    ids=["sd3", "qwen_image_21", "flux"],
)
def test_compiled_blocks_train_a_step_and_pass_the_check_before_it(
    family: str, options: dict[str, Any], blocks: list[str],
    tiny: Make, quickly_compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    checked: list[str] = []
    monkeypatch.setattr(
        "velatura.core.stages.rl.self_check", lambda *arguments: checked.append("once") or self_check(*arguments)
    )
    metrics = train(tmp_path, family, tiny(family), ENGINES["local"], compile=True, **options)
    assert metrics["updated"] == 1
    assert metrics["grad_norm"] > 0
    assert checked == ["once"]
    assert quickly_compiled == blocks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_new_lengths_of_prompts_and_sizes_of_groups_compile_nothing_anew(
    opened: Make, quickly_compiled: list[str]
) -> None:
    plain, other = (opened("qwen_image_21", lora_rank=2, compile=compiles) for compiles in (False, True))
    nets = [wake(adapter.load(CPU)) for adapter in (plain, other)]

    def compare(texts: tuple[str, ...], each: int, grad: bool) -> None:
        prompts = [Prompt(id=text, text=text, task="t2i") for text in texts]
        rows = torch.arange(len(prompts)).repeat_interleave(each)
        x, t = other.noise(prompts, list(range(len(rows)))), torch.linspace(0.9, 0.2, len(rows))
        with torch.set_grad_enabled(grad):
            expected, found = (
                other.velocity(net, x, t, other.prepare(net, other.encode(prompts)), rows) for net in nets
            )
        assert found.requires_grad is grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    for grad in (False, True):
        for texts, each in ((("a",), 2), (("a fox",), 3), (("a fox", "two foxes"), 3), (("an owl", "a fox"), 2)):
            compare(texts, each, grad)
    assert quickly_compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grad in (False, True):
            compare(("a red fox with a blue hat beside a green door",), 4, grad)
            compare(("an owl", "a red fox with a blue hat", "two birds on a wire"), 5, grad)


def test_compiled_blocks_wear_every_set(opened: Make, quickly_compiled: list[str]) -> None:
    plain, other = (opened("sd3", lora_rank=2, compile=compiles) for compiles in (False, True))
    policies = [Policy(adapter.load(CPU)) for adapter in (plain, other)]
    x, t, rows = plain.noise(PROMPTS[:1], [1]), torch.tensor([0.7]), torch.zeros(1, dtype=torch.int64)
    cond = plain.encode(PROMPTS[:1])
    drawn: dict[str, list[Tensor]] = defaultdict(list)
    for policy in policies:
        policy.remember("reference", follows=False)
        wake(policy.net)
        policy.changed()
        for name in ("current", "reference", "current"):
            with policy.wearing(name) as net:
                drawn[name].append(plain.velocity(net, x, t, cond, rows))
    assert quickly_compiled
    for velocities in drawn.values():
        for v in velocities:
            torch.testing.assert_close(v, velocities[0], rtol=0, atol=1e-6)
    assert float((drawn["current"][0] - drawn["reference"][0]).abs().max()) > 1e-4


def checking(adapter: Any) -> tuple[Learner, MicroBatch]:
    """A learner before its first update."""
    net = adapter.load(CPU)
    policy = Policy(net)
    engine = make_engine(net, EngineConfig(kind="local", device="cpu"), OptimizerConfig(lr=1e-3))
    for name in ("old", "reference"):
        policy.remember(name)
    learner = Learner(
        engine=engine, policy=policy, adapter=adapter, guidance=NoGuidance(), objective=NFT(),
        encoder=Encoder(adapter, engine.device),
    )  # fmt: skip
    group = Group(prompt=PROMPTS[0], samples=(0, 1), numbers=(0, 1))
    x, noise = adapter.noise(PROMPTS[:1] * 2, [1, 2]), PointNoise(seed=0, step=0, shared=True)
    times, train = adapter.times(4), torch.tensor([0, 2])
    return learner, forward_points([group], x, torch.tensor([1.0, -1.0]), times, train, torch.ones(4), noise, 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("given", "named"),
    [({}, ""), ({"attention": "native"}, ".*`attention: native`: leave")],
    ids=["plain", "native"],
)
def test_an_update_that_computes_something_else_than_rollouts_is_refused_and_the_cause_named(
    given: dict[str, Any], named: str, precision: str, opened: Make
) -> None:
    learner, batch = checking(opened("sd3", precision, lora_rank=2, **given))
    self_check(learner, batch)

    def other_arithmetic(_: nn.Module, __: Any, output: Any) -> Any:
        return (output[0] * 1.2,) if torch.is_grad_enabled() else output

    learner.policy.net.register_forward_hook(other_arithmetic)
    message = "velocity of the update differs by up to .*from that of rollouts" + named
    with pytest.raises(SelfCheckError, match=message) as told:
        self_check(learner, batch)
    assert ("likely cause" in str(told.value)) is bool(given)
