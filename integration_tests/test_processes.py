"""`velatura run --processes 2`: two real processes do what one does, also with sharded weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

TINY = Path(__file__).with_name("recipes") / "tiny.yaml"
Run = Callable[..., subprocess.CompletedProcess[str]]
UNEVEN = (
    "engine.kind=deepspeed", "stages.teacher_t2i.micro_batch=4", "stages.teacher_t2i.updates_per_step=3",
    "plugins=[./first_alone.py]", "stages.teacher_edit.prompt_filter=first-alone",
)  # fmt: skip
"""Three groups in three updates, and a filter that leaves one group: one of two processes has nothing to learn from."""
TRAINED = ("warm", "teacher_t2i", "teacher_edit", "student")
COUNTED = ("rows/forward", "rows/gradient")
"""What a process adds when it has run out of work."""
NOTHING_STAYS = "{zero_optimization: {stage3_param_persistence_threshold: 0}}"
"""Else ZeRO 3 does not shard parameters as small as these."""
ZERO_3 = ("engine.zero_stage=3", "engine.offload_optimizer=true", f"engine.raw={NOTHING_STAYS}")
OTHERS = ["two", "zero 3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, velatura: Run, console_script: Run) -> dict[str, Path]:
    """Name -> run folder of the tiny recipe. The launcher of the command starts the processes of one of them."""
    folders = {name: tmp_path_factory.mktemp("processes") for name in ("one", *OTHERS)}
    for folder in folders.values():
        shutil.copy(TINY, folder / "tiny.yaml")
        shutil.copy(TINY.with_name("first_alone.py"), folder)
    recipe = ("run", "tiny.yaml", *UNEVEN)
    velatura(*recipe, "--processes", "1", cwd=folders["one"])
    console_script(*recipe, "--processes", "2", cwd=folders["two"])
    velatura(*recipe, *ZERO_3, cwd=folders["zero 3"], processes=2)
    return {name: folder / "runs" / "tiny" for name, folder in folders.items()}


def metrics(run: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_learn_what_one_learns(runs: dict[str, Path], stage: str, other: str) -> None:
    """Up to the order of sums in fp32, grown by Adam over a few updates."""
    one, two = (load_file(runs[name] / stage / "weights.safetensors") for name in ("one", other))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    start = load_file(runs["one"] / "warm" / "weights.safetensors")
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert stage == "warm" or moved > 1e-3, "the stage has to move the weights further than rounding does"


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("stage", TRAINED)
def test_metrics_are_of_all_processes(runs: dict[str, Path], stage: str, other: str) -> None:
    one, two = metrics(runs["one"], stage), metrics(runs[other], stage)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name in COUNTED:
                assert a[name] <= b[name] <= a[name] + 60
            elif not name.startswith("time/"):
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize("stage", ["curate_t2i", "curate_edit"])
def test_the_same_prompts_are_kept(runs: dict[str, Path], stage: str) -> None:
    one, two = (pq.read_table(runs[n] / stage / "ledger.parquet").to_pydict() for n in ("one", "two"))
    assert one["keep"] == two["keep"]
    assert one["prompt_id"] == two["prompt_id"]
    np.testing.assert_allclose(one["range"], two["range"], rtol=1e-4, atol=1e-5)


def test_evaluation_over_processes_is_evaluation_on_one(runs: dict[str, Path]) -> None:
    one, two = (pq.read_table(runs[n] / "compare" / "samples.parquet").to_pydict() for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in ("model", "route", "prompt_id", "seed", "text"):
        assert one[name] == two[name]
    first = [i for i, model in enumerate(one["model"]) if model == "warm"]  # equal weights up to one rounding
    for name in (n for n in one if n.startswith(("gold/", "reward/"))):
        a, b = ([table[name][i] for i in first] for table in (one, two))
        assert [v is None for v in a] == [v is None for v in b]
        np.testing.assert_allclose([v for v in a if v is not None], [v for v in b if v is not None], atol=0.02)
    drawn = [runs[n] / "compare" / "images" / "warm" / "t2i.npz" for n in ("one", "two")]
    images = [np.load(path)["images"].astype(int) for path in drawn]
    assert images[0].shape == images[1].shape
    assert np.abs(images[0] - images[1]).max() <= 2  # of 255


def test_one_process_shows_and_every_other_has_a_log(runs: dict[str, Path]) -> None:
    assert not (runs["one"] / "logs").exists()
    assert [path.name for path in (runs["two"] / "logs").iterdir()] == ["process-1.log"]
    assert "teacher_t2i" in (runs["two"] / "logs" / "process-1.log").read_text()


def test_a_checkpoint_of_two_processes_is_in_parts_and_its_weights_in_one_file(runs: dict[str, Path]) -> None:
    for stage, inference in (("warm", "set-ema"), ("teacher_t2i", "policy"), ("student", "policy")):
        newest = max((runs["zero 3"] / stage / "checkpoints").iterdir())
        names = {path.name for path in newest.iterdir()}
        assert {"optimizer.1-of-2.safetensors", "optimizer.2-of-2.safetensors", "random-1.safetensors"} <= names
        assert ("prompts.parquet" in names) == (stage == "teacher_t2i")
        state = json.loads((newest / "state.json").read_text())["content"]["state"]
        assert set(state["facts"].get("teachers", {})) == ({"t2i", "edit"} if stage == "student" else set())
        saved, final = load_file(newest / f"{inference}.safetensors"), runs["zero 3"] / stage / "weights.safetensors"
        assert all(torch.equal(saved[name], value) for name, value in load_file(final).items())


def test_a_recipe_goes_on_with_another_number_of_processes(runs: dict[str, Path], velatura: Run) -> None:
    again = velatura("run", "tiny.yaml", *UNEVEN, cwd=runs["two"].parent.parent)
    assert again.stdout.count("finished before and unchanged") == len(list(runs["two"].glob("*/manifest.json")))


def test_a_mistake_is_told_once(tmp_path: Path, velatura: Run) -> None:
    """Each process finds it; the first one says it."""
    shutil.copy(TINY, tmp_path / "tiny.yaml")
    arguments = ("engine.kind=deepspeed", "stages.warm.batch=1", "--stage", "warm", "--processes", "2")
    done = velatura("run", "tiny.yaml", *arguments, cwd=tmp_path, status=2)
    assert done.stderr.count("velatura: ") == 1
    assert "stages.warm.batch" in done.stderr
    assert "1 a step cannot be shared by 2 processes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--processes", "0"), "at least one process"),
        (("--processes", "2"), "'local' is one process, and 2 are asked for"),
    ],
)
def test_what_cannot_be_started_is_refused(
    tmp_path: Path, velatura: Run, arguments: tuple[str, ...], said: str
) -> None:
    shutil.copy(TINY, tmp_path / "tiny.yaml")
    assert said in velatura("run", "tiny.yaml", *arguments, cwd=tmp_path, status=2).stderr
    assert not (tmp_path / "runs").exists()


def processes_of(run: Path) -> list[int]:
    """The processes that a launcher started for this run, first rank first."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode().split("\0")
            environment = dict(
                line.split("=", 1) for line in (path / "environ").read_bytes().decode().split("\0") if "=" in line
            )
            folder = (path / "cwd").resolve()
        except OSError:
            continue
        if "velatura.core.cli" in command and folder == run.parent.parent and "RANK" in environment:
            found[int(environment["RANK"])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_process_ends_the_run_which_then_goes_on(tmp_path: Path, velatura: Run) -> None:
    """The second process is killed in the middle of reinforcement learning with ZeRO 3; nothing hangs, and one process
    with ZeRO 1 finishes it."""
    shutil.copy(TINY, tmp_path / "tiny.yaml")
    run = tmp_path / "runs" / "tiny"
    arguments = ["run", "tiny.yaml", "engine.kind=deepspeed", "stages.warm.steps=3", "stages.teacher_t2i.steps=20"]
    arguments += ["stages.teacher_t2i.checkpoint_every=1", f"engine.raw={NOTHING_STAYS}"]
    command = [str(Path(sys.executable).with_name("velatura")), *arguments, "engine.zero_stage=3", "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 900
    while not (run / "teacher_t2i" / "checkpoints" / "step-000003").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(processes_of(run)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "process 1 was killed by SIGKILL" in said
    assert processes_of(run) == []
    manifest = json.loads((run / "teacher_t2i" / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    assert "process 1 was killed by SIGKILL" in manifest["error"]
    done = velatura(*arguments, "--stage", "teacher_t2i", cwd=tmp_path)
    assert "teacher_t2i: goes on from step" in done.stdout
    assert len(metrics(run, "teacher_t2i")) == 20
