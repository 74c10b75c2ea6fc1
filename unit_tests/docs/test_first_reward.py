"""The reward in the README, exactly as it is printed there, trains."""

import json
import re
from pathlib import Path

import pytest

from velatura.core.pipeline import run_pipeline

ROOT = Path(__file__).parents[2]
RECIPE = """\
plugins: [my_reward.py]
output: {output}
engine: {{kind: local, threads: 1}}
adapter: {{use: tinyworld, with: {{weights: null, width: 48, layers: 2}}}}
sampling: {{steps: 3}}
stages:
  redder:
    stage: rl
    task: {{use: tinyworld, with: {{task: t2i, count: 4}}}}
    rewards: [{{use: my_reward/redness}}]
    steps: 1
    prompts_per_step: 2
    group_size: 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("first-reward")
    (code,) = re.findall(r"^```python\n(# my_reward\.py\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (folder / "my_reward.py").write_text(code)
    (folder / "recipe.yaml").write_text(RECIPE.format(output=folder / "run"))
    return run_pipeline(folder / "recipe.yaml")


def metrics_of(folder: Path) -> dict[str, float]:
    (line,) = (folder / "redder" / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def test_the_reward_of_the_readme_trains_one_step(run):
    metrics = metrics_of(run)
    assert 0 < metrics["reward/my_reward/redness/mean"] < 1
    assert metrics["reward/my_reward/redness/failed"] == 0
    assert metrics["updated"] == 1
    assert metrics["grad_norm"] > 0
    assert json.loads((run / "redder" / "manifest.json").read_text())["status"] == "finished"


def test_every_metric_of_a_run_is_explained(run):
    names = re.findall(r"`([\w/<>]+)`", (ROOT / "docs" / "metrics.md").read_text())
    known = [re.compile(re.sub(r"<\w+>", ".+", name)) for name in names]
    unknown = [name for name in metrics_of(run) if name != "step" and not any(p.fullmatch(name) for p in known)]
    assert not unknown
