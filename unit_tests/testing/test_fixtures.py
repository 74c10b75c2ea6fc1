"""The fixtures that plugin authors are given, used as they use them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from velatura.api import ModelAdapter, NoOptions, Prompt
from velatura.core.errors import RecipeError, RewardError
from velatura.core.registry import Registry
from velatura.testing.fixtures import FLAKY, TinyRun

pytest_plugins = ["velatura.testing.fixtures"]


def test_the_empty_registry_knows_nothing_of_what_is_installed(empty_registry: Registry) -> None:
    assert list(empty_registry.list()) == []
    with pytest.raises(RecipeError):
        empty_registry.get("kernel", "ode")


def test_the_toy_adapter_draws_from_noise(toy_adapter: ModelAdapter[NoOptions]) -> None:
    prompts = [
        Prompt(id=str(i), text=text, task="t2i") for i, text in enumerate(("a red circle on white", "a blue square"))
    ]
    net = toy_adapter.load(torch.device("cpu"))
    assert sum(weight.numel() for weight in net.parameters()) < 200_000
    x = toy_adapter.noise(prompts, [1, 2])
    cond = toy_adapter.prepare(net, toy_adapter.encode(prompts))
    v = toy_adapter.velocity(net, x, torch.tensor([0.9, 0.4]), cond, torch.tensor([0, 1]))
    assert v.shape == x.shape
    pictures = toy_adapter.decode(x)
    assert pictures.shape == (2, 3, 24, 24)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1


def test_a_whole_run_in_a_temporary_directory(tiny_run: Callable[..., TinyRun]) -> None:
    run = tiny_run(steps=2)
    assert run.manifest["status"] == "finished"
    assert [step["updated"] for step in run.metrics] == [1, 1]
    assert (run.stage / "weights.safetensors").exists()


@pytest.mark.parametrize("how", ["raise", "failed", "nan"])
def test_a_reward_that_fails_on_demand_is_counted(tiny_run: Callable[..., TinyRun], how: str) -> None:
    reward = {"use": "flaky/brightness", "with": {"every": 4, "how": how}}
    (step,) = tiny_run(plugins=[FLAKY], rewards=[reward], max_failed=1.0).metrics
    assert step["reward/flaky/brightness/failed"] == 3  # of 8, the same ones however it fails
    assert math.isfinite(step["reward/flaky/brightness/mean"])


def test_a_reward_that_always_fails_stops_the_run(tiny_run: Callable[..., TinyRun]) -> None:
    with pytest.raises(RewardError, match="this reward was told to fail"):
        tiny_run(plugins=[FLAKY], rewards=[{"use": "flaky/brightness", "with": {"every": 1}}])
