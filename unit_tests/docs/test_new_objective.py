"""The example of an objective in one file: its gradient, the checks of its kind, and a run that trains with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from velatura.api import Points, Role
from velatura.core.pipeline import run_pipeline
from velatura.core.registry import Registry
from velatura.testing import NotChecked
from velatura.testing.conformance import component_checks

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_objective"


@pytest.fixture
def registry() -> Registry:
    found = Registry.discover()
    found.add_file(EXAMPLE / "ram.py")
    return found


def test_it_is_short() -> None:
    code = (EXAMPLE / "ram.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in code) <= 60


def test_its_gradient_is_its_formula(registry: Registry) -> None:
    draw = torch.Generator().manual_seed(0)
    v, old, reference, target = torch.randn(4, 5, 6, generator=draw)
    advantage, weight = torch.tensor([-9.0, -1.0, 0.0, 0.5, 7.0]), torch.full((5,), 0.2)
    where = Points(x=target, t=torch.linspace(0, 1, 5), advantage=advantage, weight=weight, target=target)
    current = v.clone().requires_grad_()
    objective = registry.get("objective", "ram/ram")()
    loss = objective.loss(where, {Role.CURRENT: current, Role.OLD: old, Role.REFERENCE: reference})
    loss.value.backward()
    closed = 2 * (v - reference) - 2 * advantage.clamp(-5, 5)[:, None] * (target - old)
    torch.testing.assert_close(current.grad, 0.2 / 6 * closed)


def test_it_passes_the_checks_of_its_kind(registry: Registry) -> None:
    (info,) = registry.components_of("ram")
    for check in component_checks(info, registry.get("objective", "ram/ram"), ()):
        try:
            check()
        except NotChecked as why:
            pytest.fail(f"{check.name}: {why}")


def test_the_recipe_of_its_page_trains_with_it(tmp_path: Path) -> None:
    text = (EXAMPLE / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    recipe = yaml.safe_load(text) | {"engine": {"kind": "local", "threads": 1}, "output": str(tmp_path / "run")}
    (tmp_path / "ram.py").write_text((EXAMPLE / "ram.py").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = run_pipeline(tmp_path / "recipe.yaml") / "teacher"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["updated"] for row in rows] == [1, 1]
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0 and rows[1]["grad_norm"] > 0
    assert rows[1]["probe/kl"] > 0 and rows[1]["plus/norm-hinge"] == 0  # a fresh network answers 0: no bound
    assert any(name.startswith("kl/0.") for name in rows[1])
