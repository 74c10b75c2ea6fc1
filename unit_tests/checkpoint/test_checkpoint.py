from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from loguru import logger
from torch import Tensor

from velatura.core.checkpoint import (
    Checkpoint,
    Section,
    load_checkpoint,
    load_latest,
    match_tensors,
    save_checkpoint,
    write_json_atomic,
    write_text_atomic,
)
from velatura.core.errors import CheckpointError

STATE = {"prompts_seen": 640, "best": [0.5, float("nan")], "name": "Ölmühle"}


def tensors(step: int) -> Mapping[str, Mapping[str, Tensor]]:
    flat = torch.arange(20.0) + step
    tied = torch.full((2, 3), float(step)).T
    return {
        "policy": {"a": flat[:8].view(2, 4), "b": flat[8:], "tied.1": tied, "tied.2": tied},
        "optimizer": {"updates": torch.tensor(step), "exp_avg/a": torch.ones(2, 4, dtype=torch.bfloat16)},
        "empty": {},
    }


def save(folder: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        path = save_checkpoint(folder, step, tensors(step), STATE, keep=keep)
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def newest(folder: Path) -> Checkpoint:
    found = load_latest(folder)
    assert found is not None
    return found


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    yield messages
    logger.remove(sink)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 40)
    assert path == tmp_path / "step-000040"
    assert names(path) == ["empty.safetensors", "optimizer.safetensors", "policy.safetensors", "state.json"]
    found = load_checkpoint(path)
    assert found.step == 40
    assert repr(found.state) == repr(STATE)  # NaN is not equal to itself
    for section, content in tensors(40).items():
        assert found.tensors[section].keys() == content.keys()
        for name, value in content.items():
            assert found.tensors[section][name].dtype == value.dtype
            assert torch.equal(found.tensors[section][name], value)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, keep=2)
    assert names(tmp_path) == ["step-000020", "step-000030"]
    assert newest(tmp_path).step == 30


def test_those_at_multiples_are_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save_checkpoint(tmp_path, step, tensors(step), STATE, keep=1, keep_every=20)
    assert names(tmp_path) == ["step-000020", "step-000040", "step-000050"]


def test_files_go_in_as_they_are_and_are_verified(tmp_path: Path) -> None:
    ledger = tmp_path / "prompts.parquet"
    ledger.write_bytes(b"as it was")
    path = save_checkpoint(tmp_path / "checkpoints", 1, tensors(1), STATE, keep=1, files={ledger.name: ledger})
    ledger.write_bytes(b"as it is now")
    kept = load_checkpoint(path).file("prompts.parquet")
    assert kept is not None
    assert kept.read_bytes() == b"as it was"
    flip(kept)
    with pytest.raises(CheckpointError, match=r"prompts.parquet cannot be used: .*SHA-256 differs"):
        load_checkpoint(path)


def test_a_checkpoint_from_before_there_were_parts_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 40)
    state = path / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 1}))
    assert load_checkpoint(path).tensors["optimizer"]["updates"] == 40


def test_the_one_just_written_is_kept_even_if_later_ones_exist(tmp_path: Path) -> None:
    save(tmp_path, 30, 40)
    save(tmp_path, 35, keep=1)
    assert names(tmp_path) == ["step-000035", "step-000040"]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save_checkpoint(tmp_path, 10, {"policy": {"a": torch.tensor(5)}}, {}, keep=1)
    assert names(tmp_path) == ["step-000010"]
    assert load_checkpoint(tmp_path / "step-000010").tensors["policy"]["a"] == 5


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 999_999, 1_000_000)
    assert newest(tmp_path).step == 1_000_000


def test_half_written_ones_are_ignored_and_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-000050").mkdir()
    (tmp_path / ".writing-step-000050" / "policy.safetensors").write_bytes(b"half")
    (tmp_path / "step-000060").touch()  # a file
    assert load_latest(tmp_path) is None
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-000010", "step-000060"]


def test_there_is_nothing_in_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "nowhere") is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def age(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def alter(path: Path) -> None:
    path.write_text(path.read_text().replace("640", "641"))


DAMAGE = [
    ("policy.safetensors", truncate, r"has \d+ bytes, \d+ were written"),
    ("optimizer.safetensors", flip, "SHA-256 differs"),
    ("policy.safetensors", Path.unlink, r"missing; \d+ bytes were written"),
    ("state.json", Path.unlink, "missing"),
    ("state.json", truncate, "not the JSON that was written"),
    ("state.json", alter, "SHA-256 differs"),
    ("state.json", age, "format 99, this Velatura reads formats 1 to 2"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_a_damaged_checkpoint_names_the_file_the_reason_and_the_remedy(tmp_path, name, damage, reason) -> None:
    path = save(tmp_path, 30, 40)
    damage(path / name)
    remedy = f"Delete {path} and the run goes on from step-000030"
    with pytest.raises(CheckpointError, match=rf"{path / name} cannot be used: .*{reason}.*\. {remedy}\."):
        load_checkpoint(path)


def test_a_damaged_first_checkpoint_means_starting_over(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    truncate(path / "policy.safetensors")
    with pytest.raises(CheckpointError, match="starts from its beginning"):
        load_checkpoint(path)


def test_the_run_goes_on_from_the_newest_good_one_and_says_so(tmp_path: Path, warnings_logged: list[str]) -> None:
    save(tmp_path, 20, 30, 40)
    truncate(tmp_path / "step-000040" / "policy.safetensors")
    (tmp_path / "step-000030" / "state.json").unlink()
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 20
    assert len(warnings_logged) == 2
    assert "step-000040/policy.safetensors" in warnings_logged[0]
    assert "step-000030/state.json" in warnings_logged[1]


def test_a_folder_with_damaged_ones_only_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    truncate(path / "policy.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        load_latest(tmp_path)


def test_a_section_that_is_no_file_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.\./policy"):
        save_checkpoint(tmp_path, 1, {"../policy": {}}, {}, keep=1)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from velatura.core.checkpoint import save_checkpoint, write_text_atomic
from velatura.core.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = Path(sys.argv[1])
for write in (
    lambda: save_checkpoint(folder, 40, {"policy": {"a": torch.zeros(300_000)}}, {}, keep=1),
    lambda: write_text_atomic(folder / "report.html", "x" * 200_000),
):
    try:
        write()
    except CheckpointError as error:
        print(error)
"""


def test_a_file_system_that_takes_no_more_leaves_the_earlier_checkpoint_intact(tmp_path: Path) -> None:
    """A limit on file size is the one full disk that every machine can have."""
    save(tmp_path, 30)
    (tmp_path / "report.html").write_text("old")
    run = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    saving, writing = run.stdout.splitlines()
    assert f"cannot write {tmp_path / 'step-000040'}" in saving
    assert "needs 1200000 bytes" in saving
    assert " free" in saving
    assert f"cannot write {tmp_path / 'report.html'}" in writing
    assert names(tmp_path) == ["report.html", "step-000030"]
    assert (tmp_path / "report.html").read_text() == "old"
    assert load_checkpoint(tmp_path / "step-000030").step == 30


def test_a_folder_that_cannot_be_made_is_told_like_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000001: .*(exists|directory)"):
        save(tmp_path / "file", 1)


ENDLESS = """
import sys
from pathlib import Path
import torch
from velatura.core.checkpoint import save_checkpoint
for step in range(1, 10**6):
    value = torch.full((200_000,), float(step))
    save_checkpoint(Path(sys.argv[1]), step, {"a": {"x": value}, "b": {"x": value}}, {"step": step}, keep=2)
"""


def test_a_process_killed_at_any_moment_leaves_a_complete_newest_checkpoint(tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(folder)])
        while not any(folder.glob("step-*")):
            time.sleep(0.01)
        time.sleep(0.05 + 0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found = load_checkpoint(max(folder.glob("step-*")))
        assert found.state == {"step": found.step}
        assert all(section["x"][0] == found.step for section in found.tensors.values())


def test_tensors_of_another_model_are_told_by_their_first_difference() -> None:
    ours = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    match_tensors(ours, {"b": torch.ones(4), "a": torch.ones(2, 3)}, what="x")
    for theirs, told in [
        (
            {"a": torch.zeros(2, 4), "b": torch.zeros(4)},
            r"'a', where the model has \[2, 3\] and the checkpoint \[2, 4\]",
        ),
        ({"a": torch.zeros(2, 3)}, r"'b', where the model has \[4\] and the checkpoint nothing"),
        ({**ours, "c": torch.zeros(())}, r"'c', where the model has nothing and the checkpoint \[\]"),
    ]:
        with pytest.raises(CheckpointError, match="step-000010 is of another model: first difference " + told):
            match_tensors(ours, theirs, what="step-000010")


def test_whether_tensors_fit_is_seen_without_reading_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section of hundreds of gigabytes is read once, when its tensors are taken."""
    found = load_checkpoint(save(tmp_path, 10)).tensors["policy"]
    ours = dict(tensors(10)["policy"])
    monkeypatch.delattr(Section, "__getitem__")
    match_tensors(ours, found, what="x")
    for change, told in [
        ({"b": torch.zeros(3)}, r"'b', .* \[3\] and the checkpoint \[12\]"),
        ({"c": ours["a"]}, "'c'"),
    ]:
        with pytest.raises(CheckpointError, match=told):
            match_tensors({**ours, **change}, found, what="x")


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "facts.json"
    write_json_atomic(path, {"a": [1, "ü"]})
    write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert names(path.parent) == ["facts.json"]
    write_text_atomic(path, "ü")
    assert path.read_bytes() == "ü".encode()


def test_json_that_browsers_cannot_read_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json_atomic(tmp_path / "facts.json", {"a": float("nan")})
    assert names(tmp_path) == []
