"""The family that docs/models.md adds in one file samples, bit for bit, what its stock pipeline samples, and trains."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from velatura.api import Context, Prompt
from velatura.core.build import build, open_registry
from velatura.core.pipeline import run_pipeline
from velatura.core.recipe import load_recipe
from velatura.testing import difference_to_pipeline

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "new_family" / "aura_flow.py"
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """Reinforcement learning of the new family by the file that stands in the documentation."""
    (code,) = re.findall(
        r"^```python\n# aura_flow\.py\n(.*?)^```$", (ROOT / "docs" / "models.md").read_text(), re.M | re.S
    )
    assert code == EXAMPLE.read_text()
    assert len(code.splitlines()) <= 90
    (tmp_path / "aura_flow.py").write_text(code)
    (tmp_path / "t2i.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("a red fox", "a bird")))
    options = {"path": str(tiny("diffusers_flow_aura")), "height": 32, "width": 48, "lora_rank": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "output": str(tmp_path / "run"), "plugins": ["./aura_flow.py"],
        "engine": {"kind": "local", "threads": 1, "device": "cpu"},
        "adapter": {"use": "aura_flow/aura-flow", "with": options}, "sampling": {"steps": 2, "batch": 8},
        "stages": {"teacher": {
            "stage": "rl", "task": {"use": "prompts", "with": {"file": "t2i.jsonl"}},
            "rewards": ["tinyworld-sharpness"], "steps": 1, "prompts_per_step": 2, "group_size": 2,
        }},
    }))  # fmt: skip
    return path


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_family_of_the_documentation_is_its_stock_pipeline(scale: float, recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ["adapter.with.lora_rank=null"])
    adapter: Any = build(open_registry(loaded), "adapter", loaded.stage("teacher").adapter)  # type: ignore[union-attr]
    adapter.setup(Context(device=CPU, cache=tmp_path / "cache", seed=0, base=tmp_path))
    pipe, family = adapter.pipe, importlib.import_module("diffusers_flow_aura")
    pipe.transformer = adapter.load(CPU)

    def stock(prompt: Prompt, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
        return family.stock(pipe, prompt, seeds, steps, scale)

    prompts = [Prompt(id=text, text=text, task="t2i") for text in ("a red fox", "two birds on a wire")]
    assert difference_to_pipeline(adapter, stock, prompts, scale=scale, joined=True) == 0.0
    picture = adapter.decode(adapter.noise(prompts, [1, 2]))
    assert picture.shape == (2, 3, 32, 48)
    assert adapter.latents(picture).shape == adapter.noise(prompts, [1, 2]).shape


def test_the_family_of_the_documentation_trains(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = run_pipeline(recipe)
    assert json.loads((run / "teacher" / "manifest.json").read_text())["result"]["relative_change"] > 0
