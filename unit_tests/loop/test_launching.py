"""What is read of launchers and hostfiles, and who is named when processes wait. Real processes: integration_tests."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from velatura.core.errors import VelaturaError
from velatura.core.hostfile import command_of, is_here, read_hostfile, start_on
from velatura.core.pulse import alive, sign, waiting
from velatura.core.slurm import adopt_slurm, first_node, tasks_of_nodes, without_srun
from velatura.core.watch import Beat, Heard, gone, standing

STEP = {
    "SLURM_STEP_NUM_TASKS": "12", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
}  # fmt: skip


def test_a_task_of_srun_is_a_process() -> None:
    found = dict(STEP)
    adopt_slurm(found)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [found[name] for name in names] == ["9", "12", "1", "4", "gpu07"]
    other = {**STEP, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    adopt_slurm(other)
    assert found["MASTER_PORT"] == other["MASTER_PORT"]
    assert other["LOCAL_WORLD_SIZE"] == "8"
    adopt_slurm(later := {**STEP, "SLURM_STEP_ID": "3"})
    assert later["MASTER_PORT"] != found["MASTER_PORT"]
    assert 20_000 <= int(found["MASTER_PORT"]) < 30_000


@pytest.mark.parametrize(
    "own",
    [
        {"WORLD_SIZE": "2", "RANK": "1"},  # torchrun below srun
        {"SLURM_STEP_NUM_TASKS": "1"},
        {},
    ],
)
def test_another_launcher_or_a_single_task_is_left_alone(own: dict[str, str]) -> None:
    found = {**(STEP if "WORLD_SIZE" in own else {}), **own}
    before = dict(found)
    adopt_slurm(found)
    assert found == before


def test_what_the_user_sets_is_kept_and_a_task_with_one_gpu_calls_it_0() -> None:
    found = {**STEP, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4321", "CUDA_VISIBLE_DEVICES": "3"}
    adopt_slurm(found)
    assert [found[name] for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")] == ["10.0.0.7", "4321", "0"]
    adopt_slurm(several := {**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert several["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SLURM_PROCID": "x"}, "SLURM started 12 tasks, but SLURM_PROCID is 'x' and not a number"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is '', which names no machine"),
    ],
)
def test_what_slurm_does_not_say_is_one_message(change: dict[str, str], said: str) -> None:
    with pytest.raises(VelaturaError, match="SLURM") as error:
        adopt_slurm({**STEP, **change})
    assert said in str(error.value)


def test_a_job_script_without_srun_is_told_so() -> None:
    script = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    adopt_slurm(script)
    assert "WORLD_SIZE" not in script
    assert "Put srun before the command" in without_srun(script)
    assert without_srun({**script, "SLURM_STEP_NUM_TASKS": "16"}) == ""
    assert without_srun({"SLURM_NTASKS": "16"}) == "", "an interactive allocation"
    assert without_srun({}) == ""


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("a[1,3]-b[2-4].net,c", "a1-b2.net"),
        ("x-1,y[2-3]", "x-1"),
    ],
)
def test_the_first_machine_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_tasks_of_machines() -> None:
    assert tasks_of_nodes("8(x2),3") == [8, 8, 3]
    assert tasks_of_nodes("") == tasks_of_nodes("many") == []


def test_a_hostfile_is_machines_in_order(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nb-2.net slots=8\n\na-1   slots=4  # half of it\n")
    assert list(read_hostfile(file).items()) == [("b-2.net", 8), ("a-1", 4)]
    with pytest.raises(VelaturaError, match="cannot be read"):
        read_hostfile(tmp_path / "none")
    assert is_here("localhost")
    assert not is_here("b-2.net")


def test_arguments_reach_the_other_machines_as_one_word_that_no_shell_reads(tmp_path: Path) -> None:
    given = ["run", "r.yaml", "a={b: 'c d', e: [$HOME, *]}"]
    *front, word = command_of(tmp_path / "hosts", given, "10.0.0.1")
    assert front[front.index("--master_addr") + 1] == "10.0.0.1"
    assert json.loads(base64.urlsafe_b64decode(word)) == given
    assert word.replace("-", "").replace("_", "").replace("=", "").isalnum()


def test_a_missing_program_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VelaturaError, match="needs pdsh, which starts the processes on several machines"):
        start_on({"a": 1, "b": 1}, tmp_path / "hosts", ["run", "r.yaml"])


def heard(seconds: float, *, waiting: bool = False, silent: float = 1.0, what: str = "drawing") -> Heard:
    return Heard(beat=Beat(number=1, what=what, seconds=seconds, waiting=waiting, machine="m"), silent=silent)


def test_who_is_silent_is_gone() -> None:
    assert gone([heard(0), heard(0, silent=9)], 10) is None
    rank, said = gone([heard(0, silent=11), heard(0, silent=12, what="judging")], 10) or (None, "")
    assert rank == 1
    assert said.startswith("has not been heard of for 12 s. It was last at: judging.")
    rank, said = gone([heard(0), Heard(beat=None, silent=20)], 10) or (None, "")
    assert (rank, "last at" in said) == (1, False)


def test_who_waits_for_others_does_not_stand_still() -> None:
    assert standing([heard(50, waiting=True), heard(9)], 10) is None
    rank, said = standing([heard(50, waiting=True), heard(11, what="judging")], 10) or (None, "")
    assert rank == 1
    assert said.startswith("has been at one thing for 11 s: judging. If it needs so long, raise engine.timeout (10 s)")
    rank, said = standing([heard(11, what="a"), heard(12, what="b"), heard(8.5, what="c"), heard(7)], 10) or (None, "")
    assert rank == 1
    assert "Then stood still: 0 (a), 2 (c)." in said


def test_when_all_wait_the_first_that_did_is_named() -> None:
    rank, said = standing([heard(12, waiting=True), heard(13, waiting=True)], 10) or (None, "")
    assert rank == 1
    assert "all others have waited for each other for 13 s" in said
    assert standing([heard(12, waiting=True), Heard(beat=None, silent=1)], 10) is None


def test_a_sign_of_life_says_what_and_whether_it_waits() -> None:
    alive("drawing")
    assert (sign().what, sign().waiting) == ("drawing", False)
    with waiting():
        assert (sign().what, sign().waiting) == ("waiting for the others after drawing", True)
    assert (sign().what, sign().waiting) == ("what follows drawing", False)
    with waiting():
        pass
    assert sign().what == "what follows drawing"
    assert sign().seconds < 5
