"""Which weight sets exist follows from the objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from velatura.core.pipeline import run_pipeline
from velatura.core.policy import Policy

SMALL = {"weights": None, "width": 48, "heads": 3, "layers": 2}


def recipe(folder: Path, **stage: Any) -> Path:
    """One step of reinforcement learning on a small network."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "output": str(folder / "run"),
        "engine": {"kind": "local", "threads": 1, "device": "cpu"},
        "adapter": {"use": "tinyworld", "with": SMALL},
        "sampling": {"steps": 2},
        "stages": {"teacher": {
            "stage": "rl", "task": {"use": "tinyworld", "with": {"task": "t2i", "count": 4}},
            "rewards": [{"use": "tinyworld-aesthetics"}], "steps": 1, "prompts_per_step": 2, "group_size": 3, **stage,
        }},
    }))  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"use": "nft"}, {"old", "reference"}),
        ({"use": "nft", "with": {"kl": 0}}, {"old"}),
        ({"use": "awm"}, {"old", "reference"}),
        ({"use": "awm", "with": {"kl": 0, "ema_kl": 0}}, {"old"}),  # nothing compares with it, but it draws
    ],
    ids=["nft", "nft without KL", "awm", "awm without KL"],
)
def test_only_the_sets_that_the_objective_needs_are_kept(
    objective: dict[str, Any], expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Policy] = []
    first = Policy.__init__
    monkeypatch.setattr(Policy, "__init__", lambda policy, net: kept.append(policy) or first(policy, net))
    checked = []
    monkeypatch.setattr("velatura.core.stages.rl.self_check", lambda *_: checked.append(1))
    run_pipeline(recipe(tmp_path, objective=objective))
    assert [set(policy.sets) for policy in kept] == [expected]
    assert checked  # also where no reference tells that no weight has moved
