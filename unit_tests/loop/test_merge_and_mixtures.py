"""Models merged without training, teachers that share a route, anchors: in numbers, and in one small run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file
from torch import Tensor

from velatura.api import Role
from velatura.core.errors import RecipeError
from velatura.core.pipeline import run_pipeline
from velatura.core.stages import distill
from velatura.core.stages.merge import merged_linearly, merged_products

A, B = "block.lora_A.policy.weight", "block.lora_B.policy.weight"
RANK = 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int) -> dict[str, Tensor]:
    return {A: random(RANK, 5, seed=seed), B: random(6, RANK, seed=seed + 1), "bias": random(3, seed=seed + 2)}


def test_an_average_is_the_mean_and_task_arithmetic_adds_what_changed() -> None:
    start, models = factors(0), {"one": factors(10), "two": factors(20)}
    mean = merged_linearly(start, models, {"one": 0.25, "two": 0.75})
    added = merged_linearly(start, models, {"one": 1.0, "two": 1.0})
    for name in start:
        one, two = models["one"][name], models["two"][name]
        torch.testing.assert_close(mean[name], 0.25 * one + 0.75 * two)
        torch.testing.assert_close(added[name], one + two - start[name], atol=1e-6, rtol=1e-5)
        assert torch.equal(merged_linearly(start, models, {"one": 1.0, "two": 0.0})[name], one)


def test_merged_products_are_the_best_of_their_rank() -> None:
    start, models, weights = factors(0), {"one": factors(10), "two": factors(20)}, {"one": 0.3, "two": 0.7}
    whole = sum(
        (weights[m] * own[B].double() @ own[A].double() for m, own in models.items()), torch.zeros(6, 5).double()
    )
    merged, lost = merged_products(start, models, weights)
    assert merged[A].shape == (RANK, 5) and merged[B].shape == (6, RANK)
    values = torch.linalg.svdvals(whole)
    torch.testing.assert_close(
        (merged[B].double() @ merged[A].double() - whole).norm(), values[RANK:].norm(), atol=1e-6, rtol=1e-5
    )
    assert lost == pytest.approx(1 - float(values[:RANK].norm() / values.norm()), abs=1e-6)
    assert "bias" not in merged


def test_products_of_one_model_with_itself_are_its_own_where_means_of_factors_would_cancel() -> None:
    own = factors(10)
    turned = own | {A: -own[A], B: -own[B]}  # the same change, written otherwise
    merged, lost = merged_products(factors(0), {"one": own, "two": turned}, {"one": 0.5, "two": 0.5})
    torch.testing.assert_close(merged[B] @ merged[A], own[B] @ own[A], atol=1e-5, rtol=1e-4)
    assert lost == pytest.approx(0, abs=1e-6)
    mean = merged_linearly(factors(0), {"one": own, "two": turned}, {"one": 0.5, "two": 0.5})
    assert mean[A].abs().max() < 1e-6


def test_products_need_low_rank_weights() -> None:
    with pytest.raises(RecipeError, match=r"none are trained here. Take how: average"):
        merged_products({"w": random(2, 2)}, {"a": {"w": random(2, 2)}}, {"a": 1.0}, "stages.start.how")


RECIPE = """
engine: {kind: local, threads: 1, device: cpu}
adapter: {use: tinyworld, with: {width: 48, heads: 3, layers: 2, weights: null}}
sampling: {steps: 3, batch: 32}
guidance: none
optimizer: {lr: 1.0e-3}
stages:
  warm:
    stage: supervised
    task: {use: tinyworld, with: {task: t2i, count: 8, targets: true}}
    steps: 6
    batch: 8
    ema: 0.0
  one: &teacher
    stage: rl
    init: warm
    task: &task {use: tinyworld, with: {task: t2i, count: 4, eval_count: 2}}
    rewards: [{use: tinyworld-sharpness}]
    objective: {use: dgpo, with: {clip_range: 0.01}}
    plus: [{use: ema-kl, weight: 0.5}, {use: norm-hinge}, {use: anchor, weight: 0.1}]
    anchor: warm
    kernel: heun
    timesteps: {use: stratified, with: {count: 2, drop_first: false}}
    steps: 2
    prompts_per_step: 2
    group_size: 3
    updates_per_step: 2
    micro_batch: 16
  again: *teacher
  two:
    <<: *teacher
    objective: {use: flow-grpo}
    plus: [{use: kernel-kl, weight: 0.1, with: {kl_convention: flow_grpo_code}}]
    anchor: null
    kernel: flow-sde
    solver: dpm2
    timesteps: {use: window, with: {width: 1, place: fixed}}
    advantage: gdpo
    prompt_filter: zero-variance
  start: {stage: merge, models: {one: 0.5, two: 0.5}}
  added: {stage: merge, models: {one: 1.0, two: 1.0}, how: add}
  single: &student
    stage: distill
    init: start
    teachers: {t2i: one}
    timesteps: {use: beta, with: {over: steps, count: 1}}
    guidance: none
    steps: 2
    prompts_per_step: 1
    probe_prompts: 1
  twin: {<<: *student, teachers: {t2i: {one: 0.5, again: 0.5}}}
  mixed:
    <<: *student
    teachers: {t2i: {one: 0.5, two: 0.5}}
    prompts_per_step: 4
    kernel: flow-sde
    timesteps: all
    distiller: opd-kl
    step_weight: dt
    plus: [{use: anchor, weight: 0.04}, {use: velocity-kl, weight: 0.1}]
    anchor: two
  graded: {<<: *student, kernel: cps, timesteps: all, distiller: opd-pg, prompts_per_step: 2, updates_per_step: 2}
"""


STUDENTS: set[Role] = set()
"""Under whose guidance students drew."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("mixtures")
    (base / "mix.yaml").write_text(RECIPE)
    plain = distill.rollout

    def noted(net: Any, sampler: Any, *rest: Any, **more: Any) -> Any:
        STUDENTS.add(sampler.role)
        return plain(net, sampler, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "rollout", noted)
        yield run_pipeline(base / "mix.yaml", [f"output={base / 'run'}"])
    logger.remove()


def rows(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, stage: str) -> dict[str, Tensor]:
    return load_file(folder / stage / "weights.safetensors")


def test_a_student_draws_under_its_own_guidance_as_its_loss_does(folder: Path) -> None:
    assert folder.exists() and {Role.CURRENT} == STUDENTS  # else a ratio would not be that of the policy that drew


def test_every_number_of_these_runs_is_explained(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = re.findall(r"`([\w/<>-]+)`", page)
    known = [re.compile(re.sub(r"<[\w-]+>", ".+", name)) for name in names if name != "plus/<name>"]
    logged = {name for stage in ("warm", "one", "two", "single", "twin", "mixed", "graded") for name in
              rows(folder, stage)[0].keys() | rows(folder, stage)[-1].keys()}  # fmt: skip
    plain = {re.sub(r"^plus/[\w-]+/?", "", name) for name in logged} - {"", "step"}
    assert "plus/<name>" in names and len(plain) > 60
    assert {name for name in plain if not any(one.fullmatch(name) for one in known)} == set()


def test_a_merged_model_is_the_mean_of_its_models(folder: Path) -> None:
    one, two, start, added, warm = (weights(folder, name) for name in ("one", "two", "start", "added", "warm"))
    for name, value in start.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(added[name], start[name]) for name in added)
    assert json.loads((folder / "start" / "manifest.json").read_text())["result"]["models"] == {"one": 0.5, "two": 0.5}
    assert set(warm) == set(start)


def test_two_teachers_that_are_one_are_one_teacher_bit_for_bit(folder: Path) -> None:
    one, again = weights(folder, "one"), weights(folder, "again")
    assert all(torch.equal(one[name], again[name]) for name in one)
    single, twin = weights(folder, "single"), weights(folder, "twin")
    assert all(torch.equal(single[name], twin[name]) for name in single)
    probes = [{name for name in rows(folder, stage)[-1] if name.startswith("probe/")} for stage in ("single", "twin")]
    assert probes == [{"probe/t2i"}, {"probe/t2i/one", "probe/t2i/again"}]


def test_a_preference_with_regularisers_trains(folder: Path) -> None:
    first, last = rows(folder, "one")
    assert first["updated"] == last["updated"] == 1 and first["grad_norm"] > 0
    assert 0 < first["preference"] < 1 and last["plus/anchor"] > 0 and last["plus/ema-kl"] > 0
    assert last["probe/kl"] > 0 and abs(last["probe/norm_ratio"] - 1) < 0.5
    assert first["rows/rollout"] == 2 * 3 * 5  # three steps of heun, the last of which asks once


def test_a_fast_variant_reports_its_ratio_by_time_and_its_kernel_kl(folder: Path) -> None:
    first, last = rows(folder, "two")
    assert first["ratio/0.75-1.00"] == pytest.approx(first["ratio"], abs=1e-6)
    assert not any(name.startswith("ratio/0.0") for name in first)
    assert last["plus/kernel-kl"] >= 0 and "filter/dropped" in first
    assert first["rows/rollout"] == 2 * 3 * (1 + 2 + 1)  # a step that draws, one of dpm2, the last


def test_distillers_by_steps_train_with_an_anchor_and_teachers_by_weight(folder: Path) -> None:
    for stage in ("mixed", "graded"):
        assert all(row["updated"] == 1 and row["grad_norm"] > 0 for row in rows(folder, stage))
    mixed, graded = rows(folder, "mixed")[-1], rows(folder, "graded")[-1]
    assert mixed["kl"] > 0 and mixed["plus/anchor"] > 0 and mixed["plus/velocity-kl"] > 0
    assert graded["ratio"] == pytest.approx(1, abs=0.01) and "step_reward" in graded
    assert {"kl/0.75-1.00", "probe/t2i/one", "probe/t2i/two"} <= set(mixed)
    result = json.loads((folder / "mixed" / "manifest.json").read_text())["result"]
    assert result["teachers"] == {"t2i": "one + two"}
