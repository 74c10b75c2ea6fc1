"""What is not finite is skipped, counted, kept, replayed and, above a budget, stops the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loguru import logger
from safetensors.torch import load_file, save_file

from velatura.api import Prompt
from velatura.core.checkpoint import load_checkpoint
from velatura.core.cli import main
from velatura.core.errors import NotFiniteError, VelaturaError
from velatura.core.guard import KEPT, Fault
from velatura.core.learner import Tally
from velatura.core.pipeline import run_pipeline
from velatura.core.points import Group, MicroBatch, PointNoise, forward_points
from velatura.core.replay import replay, told
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter
from velatura.plugins.objectives.nft import NFT

PLUGIN = Path(__file__).with_name("exploding.py")
Make = Callable[..., Any]


@pytest.fixture
def batch(adapter: TinyWorldAdapter, drawings: Callable[[int], list[Prompt]]) -> MicroBatch:
    draw = torch.Generator().manual_seed(5)
    latents, advantages = torch.randn(4, 16, 48, generator=draw), torch.randn(4, generator=draw)
    groups = [Group(prompt=p, samples=(2 * i, 2 * i + 1), numbers=(0, 1)) for i, p in enumerate(drawings(2))]
    noise = PointNoise(seed=1, step=0, shared=True)
    train = torch.tensor([1, 2])
    return forward_points(groups, latents, advantages, adapter.times(6), train, torch.ones(6), noise, 8)


def written(folder: Path, options: Mapping[str, Any], engine: str = "local", **fields: Any) -> Path:
    """A recipe of one rl stage, whose output lies beside it."""
    stage = {
        "stage": "rl", "task": {"use": "tinyworld", "with": {"task": "t2i", "count": 4}},
        "rewards": [{"use": "tinyworld-sharpness"}], "steps": 4, "prompts_per_step": 2, "group_size": 4,
        "timesteps": {"use": "high-noise", "with": {"count": 2}}, "pictures_every": 99,
        "objective": {"use": "exploding/breaks", "with": dict(options)}, **fields,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "plugins": [str(PLUGIN)], "output": str(folder / "run"),
        "engine": {"kind": engine, "threads": 1, "device": "cpu"},
        "adapter": {"use": "tinyworld", "with": {"weights": None, "width": 48, "layers": 2, "heads": 3}},
        "sampling": {"steps": 3}, "stages": {"teacher": stage},
    }))  # fmt: skip
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    def make(options: Mapping[str, Any], engine: str = "local", **fields: Any) -> Path:
        return written(tmp_path, options, engine, **fields)

    return make


@pytest.fixture(scope="module")
def kept_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was kept of the first update of a run."""
    run = run_pipeline(written(tmp_path_factory.mktemp("kept"), {"at": 1, "until": 2}, steps=1))
    return run / "teacher" / "nonfinite" / "step-000000-update-0"


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING", format="{message}")
    yield messages
    logger.remove(sink)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "teacher" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("what", "engine"), [("loss", "local"), ("gradient", "local"), ("loss", "deepspeed")])
def test_an_update_that_is_not_finite_is_skipped_counted_kept_and_can_be_replayed(
    what: str, engine: str, recipe: Make, warnings_logged: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_pipeline(recipe({"at": 2, "until": 3, "what": what}, engine))
    rows = metrics(run)
    assert [row["updated"] for row in rows] == [1, 0, 1, 1]
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0]
    assert "loss" not in rows[1] and "grad_norm" not in rows[1] and "level" not in rows[1]
    assert all(row["loss"] > 0 for i, row in enumerate(rows) if i != 1)
    kept = run / "teacher" / "nonfinite" / "step-000001-update-0"
    assert sorted(path.name for path in kept.iterdir()) == [
        "batch.json", "policy.safetensors", "process-0.json", "process-0.safetensors"
    ]  # fmt: skip
    (told_by_run,) = [message for message in warnings_logged if "was not taken" in message]
    named = "the loss of micro-batch 0 of process 0 is inf" if what == "loss" else "the gradient is not finite"
    assert f"step 1, update 0: {named}" in told_by_run
    assert f"velatura replay {kept}" in told_by_run and "1 of at most 10" in told_by_run

    recipe({"at": 1, "what": what}, engine)  # the counter of the plugin begins anew, the weights and points do not
    assert main(["replay", str(kept)]) == 1
    said = capsys.readouterr().out
    assert f"stage 'teacher', step 1, update 0: {named}" in said
    assert "gradient not finite for" in said
    found = replay(kept)
    (batch,) = found.batches
    assert "proj_out.weight" in batch.parameters
    assert not found.weights and batch.trained >= len(batch.parameters) > 0
    if what == "loss":
        late = [text for text in batch.points if "t = 0." in text and text.endswith(": loss")]
        assert len(late) == len(batch.points) == 8
    else:
        assert not batch.points


@pytest.fixture
def kept(kept_once: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change, with its recipe."""
    shutil.copytree(kept_once.parents[3], tmp_path / "copy")
    return tmp_path / "copy" / kept_once.relative_to(kept_once.parents[3])


def test_a_cause_that_is_gone_is_told_as_such(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = kept.parents[2] / "run.json"
    mended = written(kept.parents[3], {"at": 10**9}, steps=1)
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "path": str(mended)}))
    assert main(["replay", str(kept)]) == 0
    assert "here everything is finite" in capsys.readouterr().out


def test_weights_that_are_broken_are_named(kept: Path) -> None:
    weights = load_file(kept / "policy.safetensors")
    weights["proj_out.weight"][0, 0] = torch.nan
    save_file(weights, kept / "policy.safetensors")
    found = replay(kept)
    assert found.weights == ("proj_out.weight",)
    assert "weights that are not finite: proj_out.weight" in told(found)
    assert "velocity of current" in found.batches[0].points[0]


def test_too_many_of_them_end_the_run_and_the_last_good_state_stays(recipe: Make) -> None:
    path = recipe({"at": 2}, steps=9, max_skipped=2)
    with pytest.raises(NotFiniteError, match=r"teacher\.max_skipped: 3 updates of stage 'teacher' .* the budget is 2"):
        run_pipeline(path)
    run = path.parent / "run"
    assert [row["updated"] for row in metrics(run)] == [1, 0, 0, 0]
    assert json.loads((run / "teacher" / "manifest.json").read_text())["status"] == "failed"
    weights = [load_checkpoint(c).tensors["policy"] for c in sorted((run / "teacher" / "checkpoints").glob("step-*"))]
    assert all(bool(value.isfinite().all()) for own in weights for value in own.values())
    with pytest.raises(NotFiniteError, match=r"3 updates of stage .* The last was step 4"):  # two are from before
        run_pipeline(path)
    assert len(list((run / "teacher" / "nonfinite").iterdir())) <= KEPT


def test_a_step_some_of_whose_updates_were_taken_measures_those() -> None:
    taken = Tally(metrics={"loss": 2.0, "updated": 1.0}, gradient_rows=3)
    broken = Tally(metrics={"updated": 0.0}, gradient_rows=3, faults=[Fault(0, 1, "the loss is nan")])
    total = Tally.of_updates([taken, broken, replace(taken, metrics={"loss": 4.0, "updated": 1.0})])
    assert total.metrics == {"loss": 3.0, "updated": pytest.approx(2 / 3)}
    assert total.gradient_rows == 9
    assert Tally.of_updates([broken]).metrics == {"updated": 0.0}
    assert str(broken.faults[0]) == "the loss of micro-batch 1 of process 0 is nan"


def test_an_infinite_advantage_is_found_though_an_objective_would_clip_it(learner: Make, batch: MicroBatch) -> None:
    learn = learner(NFT())
    before = {name: value.clone() for name, value in learn.policy.weights().items()}
    advantage = batch.points.advantage.clone()
    advantage[3] = torch.inf
    tally = learn.learn([batch, replace(batch, points=replace(batch.points, advantage=advantage))])
    assert [str(fault) for fault in tally.faults] == ["an advantage of micro-batch 1 of process 0 is not finite"]
    assert tally.metrics == {"updated": 0.0}
    assert all(torch.equal(learn.policy.weights()[name], value) for name, value in before.items())
    assert learn.learn([batch]).metrics["updated"] == 1


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda kept: (kept / "batch.json").unlink(), "is not an update that was kept"),
        (lambda kept: (kept / "process-0.json").write_text("{"), "process-0.json cannot be read"),
        (lambda kept: (kept / "process-0.safetensors").write_bytes(b"x"), "process-0.safetensors cannot be read"),
        (lambda kept: (kept / "policy.safetensors").unlink(), "policy.safetensors cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_replayed_is_told(kept: Path, break_it: Callable[[Path], object], message: str) -> None:
    break_it(kept)
    with pytest.raises(VelaturaError, match=message):
        replay(kept)


def test_the_run_folder_in_place_of_a_kept_update_says_what_there_is(kept_once: Path) -> None:
    with pytest.raises(VelaturaError, match=r"There is: .*nonfinite/step-000000-update-0"):
        replay(kept_once.parents[2])
