"""Every ablation that ships, every arm of it: read, checked, and run for two steps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from velatura.core.ablation.jobs import borrow, check_jobs, jobs_of
from velatura.core.ablation.results import find, save
from velatura.core.ablation.settings import load_ablation, recipe_path
from velatura.core.pipeline import run_pipeline
from velatura.core.recipe import load_recipe

FILES = sorted((Path(__file__).parents[2] / "recipes" / "ablations").glob("*.yaml"))
SMALL: dict[str, dict[str, Any]] = {
    "curate": {"max_prompts": 6, "group_size": 2, "prompt_filter": "{use: range, with: {threshold: 0.0}}"},
    "rl": {"steps": 2, "prompts_per_step": 3, "group_size": 2, "updates_per_step": 1},
    "distill": {"steps": 2, "prompts_per_step": 4, "probe_prompts": 2},
    "evaluate": {"max_prompts": 7, "seeds_per_prompt": 1, "bootstrap": 50},
}


def two_steps(recipe: Path, overrides: list[str]) -> Iterator[str]:
    """The same recipe, as small as it goes."""
    yield from ("engine.kind=local", "sampling.steps=8")
    for name, stage in load_recipe(recipe, overrides).stages.items():
        for key, value in SMALL.get(stage.stage, {}).items():
            yield f"stages.{name}.{key}={value}"


@pytest.fixture(scope="module")
def done() -> list[Path]:
    """Finished runs of all files, which others take stages from."""
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_arm_runs_and_the_findings_are_written(path: Path, tmp_path: Path, done: list[Path]) -> None:
    ablation = load_ablation(path)
    assert len(ablation.seeds) >= 3
    recipe = recipe_path(ablation, path)
    check_jobs(recipe, list(jobs_of(ablation, tmp_path).values()))

    ablation = ablation.model_copy(update={"seeds": [0]})
    jobs = jobs_of(ablation, tmp_path)
    for job in dict.fromkeys(jobs.values()):
        overrides = [*job.overrides, *two_steps(recipe, list(job.overrides)), f"output={job.folder}"]
        borrow(recipe, overrides, job.folder, done)
        run_pipeline(recipe, overrides)
        done.append(job.folder)
    found = find(path.stem, ablation, jobs)
    assert all(math.isfinite(test.difference.value) for test in found.tested if test.difference.n_prompts)
    assert save(found, tmp_path).exists()


def test_the_page_of_results_is_current() -> None:
    place = Path(__file__).parents[2] / "docs" / "ablations_page.py"
    spec = importlib.util.spec_from_file_location("ablations_page", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python docs/ablations_page.py"
