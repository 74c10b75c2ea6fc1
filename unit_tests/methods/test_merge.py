"""Weights added up: averages, task arithmetic, and low-rank factors, whose products are what is added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from velatura.core.check import set_up
from velatura.core.errors import RecipeError
from velatura.core.merging import merge, nearest_product
from velatura.core.pipeline import plan_run, run_pipeline
from velatura.core.stages.common import manifest_of

TINY = """\
seed: 3
engine: {kind: local, device: cpu, threads: 1}
adapter: {use: tinyworld, with: {weights: null, width: 48, heads: 3, layers: 1}}
task: {use: tinyworld, with: {task: t2i, count: 8, eval_count: 4, targets: true}}
sampling: {steps: 2, batch: 8}
stages:
  one: {stage: supervised, steps: 1, batch: 4, ema: 0.0, optimizer: {lr: 0.01}}
  two:
    stage: supervised
    task: {use: tinyworld, with: {task: edit, count: 8, targets: true}}
    steps: 1
    batch: 4
  both:
    stage: merge
    models: {t2i: one, edit: two}
    weights: {t2i: 0.5, edit: 1.5}
  compare:
    stage: evaluate
    models: [base, one, both]
    tasks: {t2i: {use: tinyworld, with: {task: t2i, count: 8, eval_count: 2}}}
    evaluators: [tinyworld-gold]
    seeds_per_prompt: 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    """The recipe with another text in place of a part of it."""

    def write(text: str = TINY) -> Path:
        path = tmp_path / "merged.yaml"
        path.write_text(text)
        return path

    return write


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_shares_count_from_the_start() -> None:
    start, one, two = ({"w": random(3, 2, seed=seed)} for seed in range(3))
    average = merge(start, [one, two], [0.5, 0.5])["w"]
    torch.testing.assert_close(average, (one["w"] + two["w"]) / 2)
    task_arithmetic = merge(start, [one, two], [1.0, 1.0])["w"]
    torch.testing.assert_close(task_arithmetic, one["w"] + two["w"] - start["w"])
    assert torch.equal(merge(start, [start, start], [1.0, 1.0])["w"], start["w"])


def test_the_precision_of_the_start_is_kept_and_small_changes_survive_the_sum() -> None:
    start = {"w": torch.ones(4, dtype=torch.bfloat16)}
    found = merge(start, [{"w": torch.full((4,), 1.0078125, dtype=torch.bfloat16)}] * 2, [1.0, 1.0])["w"]
    assert found.dtype is torch.bfloat16
    assert found.tolist() == [1.015625] * 4


def test_products_of_low_rank_factors_are_added_and_cut_to_the_best_of_their_rank() -> None:
    names = {"a.lora_A.policy.weight": (2, 6), "a.lora_B.policy.weight": (5, 2), "a.bias": (5,)}
    start, one, two = ({name: random(*shape, seed=10 * k + i) for i, (name, shape) in enumerate(names.items())}
                       for k in range(3))  # fmt: skip
    found = merge(start, [one, two], [0.5, 0.5])
    down, up = "a.lora_A.policy.weight", "a.lora_B.policy.weight"
    assert found[down].shape == (2, 6) and found[up].shape == (5, 2)
    wanted = (one[up] @ one[down] + two[up] @ two[down]).double() / 2
    u, size, v = torch.linalg.svd(wanted)
    best = u[:, :2] * size[:2] @ v[:2]
    torch.testing.assert_close((found[up] @ found[down]).double(), best, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[up] @ found[down], (one[up] + two[up]) @ (one[down] + two[down]) / 4, atol=0.1)
    torch.testing.assert_close(found["a.bias"], (one["a.bias"] + two["a.bias"]) / 2)


def test_a_sum_whose_rank_is_small_enough_is_exact() -> None:
    up, down = random(5, 2, seed=1), random(2, 6, seed=2)
    u, d = nearest_product([(up, down), (up, down)], [0.25, 0.75])
    torch.testing.assert_close((u @ d).float(), up @ down, atol=1e-5, rtol=1e-5)


def test_a_merge_stage_makes_a_model_that_is_evaluated_like_any_other(
    recipe: Callable[[], Path], tmp_path: Path
) -> None:
    folder = run_pipeline(recipe(), [f"output={tmp_path / 'run'}"])
    one, two, both = (load_file(folder / name / "weights.safetensors") for name in ("one", "two", "both"))

    plan = plan_run(recipe(), [f"output={folder}"])
    start = dict(
        set_up(plan, "adapter", plan.recipe.stage("both").adapter).load(torch.device("cpu")).named_parameters()
    )
    for name, value in both.items():
        wanted = start[name] + 0.5 * (one[name] - start[name]) + 1.5 * (two[name] - start[name])
        torch.testing.assert_close(value, wanted.detach(), atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(both[name], start[name]) for name in both)
    result = manifest_of(folder, "both")["result"]
    assert result["teachers"] == {"t2i": "one", "edit": "two"} and result["shares"] == {"t2i": 0.5, "edit": 1.5}
    assert set(manifest_of(folder, "compare")["result"]["headline"]["t2i"]["models"]) == {"base", "one", "both"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("models: {t2i: one, edit: two}", "models: {t2i: one}", "at least 2"),
        ("models: {t2i: one, edit: two}", "models: {t2i: one, edit: tow}", "no stage is called 'tow'. Did you mean"),
        ("weights: {t2i: 0.5, edit: 1.5}", "weights: {t2i: 0.5}", "route 'edit': 'weights' has no share for it"),
        ("weights: {t2i: 0.5, edit: 1.5}", "weights: {t2i: 0.5, edit: 1.0, x: 1.0}", "'models' names nobody for it"),
        ("weights: {t2i: 0.5, edit: 1.5}", "weights: mean", "average"),
        (
            "    weights: {",
            "    adapter: {use: tinyworld, with: {weights: null, width: 48, heads: 3, layers: 2}}\n    weights: {",
            "what is merged here has adapter 'tinyworld' with",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(
    recipe: Callable[[str], Path], tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in TINY
    with pytest.raises(RecipeError) as refused:
        run_pipeline(recipe(TINY.replace(old, new)), [f"output={tmp_path / 'run'}"])
    assert message in str(refused.value)
