"""Reinforcement learning on rollouts that draw noise: the whole stage on the embedded world, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file

from velatura.api import Points, Role, StepPlan, VelaturaError
from velatura.core.check import check_combinations
from velatura.core.cli import main
from velatura.core.errors import RecipeError
from velatura.core.recipe import load_recipe
from velatura.core.registry import Registry
from velatura.core.settings import StepWeightName
from velatura.core.steps import weighted, with_likelihood
from velatura.plugins.objectives.flow_grpo import FlowGRPO
from velatura.plugins.objectives.ratio import draw_of
from velatura.schedulers.kernels import Ode
from velatura.schedulers.stochastic import Cps, DanceSde, FlowSde

GRID = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])
RECIPE = """\
seed: 3
engine: {kind: local, threads: 1, device: cpu}
adapter: {use: tinyworld, with: {weights: null, width: 48, heads: 3, layers: 2}}
stages:
  learn:
    stage: rl
    task: {use: tinyworld, with: {task: t2i, count: 4, eval_count: 2}}
    objective: {use: flow-grpo, with: {kl: 0.1}}
    kernel: {use: flow-sde}
    timesteps: {use: uniform, with: {count: 2, drop_first: false, noise: all}}
    step_weight: sigma-sqrt-dt
    guidance: none
    sampling: {steps: 3, batch: 32}
    rewards: [{use: tinyworld-sharpness}]
    optimizer: {lr: 1.0e-3}
    steps: 2
    prompts_per_step: 2
    group_size: 3
    updates_per_step: 2
    micro_batch: 16
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "noisy.yaml"
    path.write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    yield path
    logger.remove()


def test_two_rounds_of_flow_grpo_start_at_ratio_one_and_move_the_weights(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float, float]] = []
    plain = FlowGRPO.loss

    def spy(self: FlowGRPO, points: Points, velocity: dict[Role, torch.Tensor]):  # type: ignore[no-untyped-def]
        draw = draw_of(points, velocity)
        assert points.log_prob is not None
        gap = (draw.kernel.log_prob(draw.x_next, draw.old) - points.log_prob).abs().max()
        share = float(points.advantage.abs().sum())
        noise = draw.old.std.flatten()  # step_weight: sigma-sqrt-dt
        torch.testing.assert_close(points.weight / points.weight.sum(), noise / noise.sum())
        assert float(points.weight.sum()) == pytest.approx(1, rel=1e-5) and len(points.weight.unique()) == 2
        seen.append((float(draw.log_ratio.detach().abs().max()), float(gap), share))
        return plain(self, points, velocity)

    monkeypatch.setattr(FlowGRPO, "loss", spy)
    assert main(["run", str(recipe)]) == 0
    updates = [(log_ratio, gap) for log_ratio, gap, share in seen if share > 0]  # the self-check asks with zeros
    assert len(updates) == 4
    assert [log_ratio == 0 for log_ratio, _ in updates] == [True, False, True, False]
    assert max(gap for _, gap in updates) < 1e-4  # batches of other shapes round otherwise
    folder = recipe.parent / "runs" / "noisy" / "learn"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["grad_norm"] > 0 and row["rollout_gap"] < 1e-4 and "clipped" in row for row in rows)
    assert rows[0]["kl"] > 0  # of the second update of the first round
    assert any(bool(value.abs().max() > 0) for value in load_file(folder / "weights.safetensors").values())


def rounds(recipe: Path, *overrides: str) -> list[dict[str, float]]:
    """What a run with other settings measured, round by round."""
    assert main(["run", str(recipe), *(f"stages.learn.{override}" for override in overrides)]) == 0
    log = recipe.parent / "runs" / "noisy" / "learn" / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_under_a_biased_ratio_the_first_one_is_one_and_the_gap_is_measured(recipe: Path) -> None:
    trained = ("adapter={use: tinyworld}", "steps=1", "updates_per_step=1")  # a fresh one ignores its prompt
    hybrid = ("guidance={use: rollout-only, with: {scale: 4.0}}", "allow_biased_ratio=true")
    (biased,), (fair,) = (rounds(recipe, *trained, *options) for options in (hybrid, ()))
    for row in (biased, fair):
        assert row["ratio"] == 1 and row["log_ratio"] == 0 and row["grad_norm"] > 0
    assert fair["rollout_gap"] < 1e-4 < 1e-2 < biased["rollout_gap"]


def test_the_guard_learns_in_a_sliding_window_of_coefficient_preserving_steps(recipe: Path) -> None:
    window = "timesteps={use: window, with: {width: 2, start: 0, every: 1}}"
    found = rounds(recipe, "objective=grpo-guard", "kernel=cps", window, "step_weight=inv-dt", "updates_per_step=1")
    assert all(row["ratio"] == 1 and row["grad_norm"] > 0 for row in found)
    assert [row["rows/gradient"] for row in found] == [12.0, 6.0]  # the last step of cps has no likelihood


def test_reward_weighted_regression_learns_from_ode_rollouts(recipe: Path) -> None:
    found = rounds(recipe, "objective=rwr", "kernel=ode", "step_weight=uniform", "updates_per_step=1")
    assert all(row["grad_norm"] > 0 and row["sample_weight"] > 1 for row in found)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("guidance=rollout-only", "guidance 'rollout-only' draws samples under another guidance .* 'both' or 'none'"),
        ("guidance=rollout-only,objective=grpo-guard", "ratio of objective 'grpo-guard'"),
    ],
)
def test_what_has_no_valid_ratio_is_refused(recipe: Path, override: str, said: str) -> None:
    overrides = [f"stages.learn.{part}" for part in override.split(",")]
    with pytest.raises(RecipeError, match=said):
        check_combinations(load_recipe(recipe, overrides), Registry.discover())


@pytest.mark.parametrize("objective", ["flow-grpo", "grpo-guard"])
def test_an_ode_with_a_ratio_is_refused_with_a_kernel_that_draws(recipe: Path, objective: str) -> None:
    overrides = ["stages.learn.kernel=ode", "stages.learn.step_weight=uniform", f"stages.learn.objective={objective}"]
    with pytest.raises(RecipeError, match=f"'{objective}' needs stochastic steps, but kernel 'ode' .*'flow-sde'"):
        check_combinations(load_recipe(recipe, overrides), Registry.discover())


@pytest.mark.parametrize("name", ["sigma-sqrt-dt", "kl"])
def test_a_weight_made_of_noise_needs_noise(recipe: Path, name: str) -> None:
    overrides = [f"stages.learn.{part}" for part in ("kernel=ode", "objective=nft", f"step_weight={name}")]
    with pytest.raises(RecipeError, match=f"step_weight.*'{name}' is made of the noise of a step"):
        check_combinations(load_recipe(recipe, overrides), Registry.discover())


def test_a_biased_ratio_can_be_asked_for(recipe: Path) -> None:
    overrides = ["stages.learn.guidance=rollout-only", "stages.learn.allow_biased_ratio=true"]
    assert check_combinations(load_recipe(recipe, overrides), Registry.discover()) == []


def test_steps_without_a_likelihood_are_not_trained_on() -> None:
    plan = StepPlan.training(torch.arange(4), steps=4, noise="all")
    assert with_likelihood(plan, FlowSde(), GRID).train.tolist() == [0, 1, 2, 3]
    assert with_likelihood(plan, Cps(), GRID).train.tolist() == [0, 1, 2]
    quiet = StepPlan(train=torch.arange(4), stochastic=torch.tensor([False, True, True, False]), weight=torch.ones(4))
    assert with_likelihood(quiet, FlowSde(), GRID).train.tolist() == [1, 2]
    with pytest.raises(VelaturaError, match=r"none of the trained steps \[3\] draws noise under kernel 'cps'"):
        with_likelihood(StepPlan.training(torch.tensor([3]), steps=4, noise="all"), Cps(), GRID)


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("uniform", [1.0, 1.0, 1.0, 1.0]),
        ("t", [1.0, 0.9, 0.7, 0.4]),
        ("dt", [0.1, 0.2, 0.3, 0.4]),
        ("dt2", [0.01, 0.04, 0.09, 0.16]),
        ("inv-dt", [10.0, 5.0, 10 / 3, 2.5]),
        ("sigma-sqrt-dt", [0.1**0.5, 0.2**0.5, 0.3**0.5, 0.4**0.5]),
    ],
)
def test_step_weights_are_one_on_average_over_trained_steps(name: StepWeightName, closed: list[float]) -> None:
    plan = weighted(StepPlan.training(torch.tensor([1, 3]), steps=4), name, DanceSde(), GRID)
    expected = torch.tensor(closed) / (closed[1] + closed[3]) * 2
    torch.testing.assert_close(plan.weight, expected, atol=1e-6, rtol=1e-5)


def test_a_plans_own_weights_stay_and_a_weight_of_nothing_is_refused() -> None:
    plan = StepPlan(train=torch.arange(3), stochastic=torch.ones(4).bool(), weight=torch.tensor([1.0, 2.0, 0.0, 5.0]))
    torch.testing.assert_close(weighted(plan, "dt", DanceSde(), GRID).weight, torch.tensor([0.5, 2.0, 0.0, 10.0]))
    last = StepPlan.training(torch.tensor([3]), steps=4, noise="all")
    with pytest.raises(VelaturaError, match=r"'sigma-sqrt-dt' weighs all trained steps \[3\] 0.*kernel 'cps'.*'dt'"):
        weighted(last, "sigma-sqrt-dt", Cps(), GRID)


@pytest.mark.parametrize("kernel", [FlowSde(), DanceSde(), Cps()], ids=lambda kernel: kernel.name)
def test_the_weight_kl_is_the_factor_of_the_kl_between_two_velocities(kernel: FlowSde | DanceSde | Cps) -> None:
    plan = weighted(StepPlan.training(torch.arange(3), steps=4), "kl", kernel, GRID)
    x, v, other = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).double()
    factors = []
    for t, t_next in zip(GRID[:3].double(), GRID[1:4].double(), strict=True):
        one, two = kernel.step(v, x, t, t_next), kernel.step(other, x, t, t_next)
        factors.append(((one.mean - two.mean).square().mean() / (2 * one.std**2)) / (v - other).square().mean())
    expected = torch.stack(factors) / torch.stack(factors).mean()
    torch.testing.assert_close(plan.weight[:3].double(), expected, atol=1e-6, rtol=1e-5)
    assert float(weighted(plan, "uniform", Ode(), GRID).weight[0]) == float(plan.weight[0])
