"""Every paper of docs/papers.md has its recipe there, none is refused, and each is what the paper's row says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from velatura.core.build import open_registry, resolve_options
from velatura.core.check import check_combinations
from velatura.core.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text()
TABLE = PAGE.split("\n## Other papers\n")[1].split("\n## ")[0]
RECIPES = PAGE.split("\n## The recipe of each paper\n")[1]
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
PAPERS = re.findall(r"^### ([^\n]+)\n(.*?)(?=^### |\Z)", RECIPES, re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```yaml\n# fragment\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(title, text) for title, body in PAPERS for text in BLOCK.findall(body)]


def merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)) or "use" in above:
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}


def said(title: str) -> list[dict[str, Any]]:
    """What the blocks of a paper say of its stages."""
    return [yaml.safe_load(text)["stages"] for name, text in BLOCKS if name.startswith(title)]


@pytest.mark.parametrize(("title", "text"), BLOCKS, ids=[f"{i}-{title[:16]}" for i, (title, _) in enumerate(BLOCKS)])
def test_no_recipe_is_refused(title: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "ram.py").write_text((ROOT / "examples" / "new_objective" / "ram.py").read_text())
    path = tmp_path / "recipe.yaml"
    whole = merged(yaml.safe_load((ROOT / "recipes" / "tinyworld.yaml").read_text()), yaml.safe_load(text))
    path.write_text(yaml.safe_dump(whole))
    recipe = load_recipe(path)
    registry = open_registry(recipe)
    resolve_options(registry, recipe)
    check_combinations(recipe, registry)


def test_every_paper_of_the_table_has_a_recipe() -> None:
    lines = [line for line in TABLE.splitlines() if line.startswith("| ")]
    rows = {paper for line in lines for paper in ARXIV.findall(line.split("|")[1])}
    with_one = {paper for title, body in PAPERS if BLOCK.search(body) for paper in ARXIV.findall(title)}
    assert len(rows) > 25
    assert rows - with_one == set()


def test_papers_without_a_recipe_say_why_and_have_none() -> None:
    (body,) = [body for title, body in PAPERS if title == "Without a recipe"]
    assert len(ARXIV.findall(body)) >= 5 and not BLOCK.search(body)
    assert not set(ARXIV.findall(body)) & {paper for title, _ in BLOCKS for paper in ARXIV.findall(title)}


def test_methods_that_are_masks_and_weights_are_flow_grpo_with_other_steps() -> None:
    for title in ("MixGRPO", "TempFlow-GRPO", "Flow-GRPO", "DanceGRPO", "Flow-CPS"):
        for stages in said(title):
            objective = stages["teacher_t2i"]["objective"]
            assert (objective if isinstance(objective, str) else objective["use"]) == "flow-grpo"
    assert said("MixGRPO")[0]["teacher_t2i"]["timesteps"]["with"]["place"] == "sliding"
    assert said("Flow-GRPO")[1]["teacher_t2i"]["timesteps"]["with"]["place"] == "random"
    assert [stages["teacher_t2i"].get("step_weight") for stages in said("TempFlow")] == ["sigma-sqrt-dt", None]
