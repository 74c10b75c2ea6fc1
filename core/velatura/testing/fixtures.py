"""Fixtures for the tests of a plugin. PYTEST_DONT_REWRITE

Ask for them in a `conftest.py` or a test module: `pytest_plugins = ["velatura.testing.fixtures"]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from velatura.core.base_settings import Ref
from velatura.core.components import ModelAdapter
from velatura.core.registry import Registry
from velatura.core.types import Context

FLAKY = Path(__file__).with_name("flaky.py")
"""A plugin file with a reward that fails on demand, `flaky/brightness`."""


@dataclass(frozen=True, slots=True)
class TinyRun:
    """A finished run of one `rl` stage in the embedded world, in plain torch."""

    folder: Path
    """The run folder."""
    metrics: tuple[Mapping[str, float], ...]
    """Of each step, by name."""
    manifest: Mapping[str, Any]
    """Of the stage: status and result."""

    @property
    def stage(self) -> Path:
        """The folder of the stage."""
        return self.folder / "teacher"


@pytest.fixture
def empty_registry() -> Registry:
    """A registry without plugins, whatever is installed: `add` an object with hooks, or `add_file`."""
    return Registry.empty()


@pytest.fixture
def toy_adapter(tmp_path: Path) -> ModelAdapter[Any]:
    """The adapter of the embedded world with a tiny untrained network, set up on the CPU; `load` gives the network.

    It draws pictures of 24 x 24 and knows the words of that world: "a red circle on white".
    """
    import torch

    from velatura.core.build import build

    options = {"weights": None, "width": 48, "layers": 2}
    made = build(Registry.discover(), "adapter", Ref.model_validate({"use": "tinyworld", "with": options}))
    made.setup(Context(device=torch.device("cpu"), cache=tmp_path / "cache", seed=0, base=tmp_path))
    assert isinstance(made, ModelAdapter)
    return made


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., TinyRun]:
    """Do a whole run in a temporary directory: `tiny_run(rewards=[{"use": "acme/redness"}])`.

    Keyword arguments are fields of the stage, in place of those here; `plugins` are plugin files. It is one step of an
    untrained network on pictures of 24 x 24, which takes a second or two of one core.
    """

    def run(plugins: Sequence[str | Path] = (), **fields: Any) -> TinyRun:
        from velatura.core.pipeline import run_pipeline

        stage = {
            "stage": "rl",
            "task": {"use": "tinyworld", "with": {"task": "t2i", "count": 4}},
            "rewards": [{"use": "tinyworld-sharpness"}],
            "steps": 1,
            "prompts_per_step": 2,
            "group_size": 4,
        } | fields
        recipe = {
            "plugins": [str(Path(plugin).resolve()) for plugin in plugins],
            "output": str(tmp_path / "run"),
            "engine": {"kind": "local", "threads": 1, "device": "cpu"},
            "adapter": {"use": "tinyworld", "with": {"weights": None, "width": 48, "layers": 2}},
            "sampling": {"steps": 3},
            "stages": {"teacher": stage},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        folder = run_pipeline(path)
        lines = (folder / "teacher" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        manifest = json.loads((folder / "teacher" / "manifest.json").read_text(encoding="utf-8"))
        return TinyRun(folder, tuple(json.loads(line) for line in lines), manifest)

    return run
