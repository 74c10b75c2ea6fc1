"""What SLURM's srun tells a process, in the variables that torch reads."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from velatura.core.errors import VelaturaError

PORTS = range(20_000, 30_000)
"""Where the processes of a job meet, by the number of the job; MASTER_PORT takes another."""


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from what srun set, where no
    other launcher has set WORLD_SIZE and srun started more than one task. MASTER_ADDR and MASTER_PORT stay, if given.

    Read are SLURM_STEP_NUM_TASKS (which sbatch and salloc do not set: a job script is not one of the tasks),
    SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID, SLURM_STEP_TASKS_PER_NODE, SLURM_STEP_NODELIST, SLURM_JOB_ID and
    SLURM_STEP_ID.

    Raises:
        VelaturaError: a variable that is needed is missing or cannot be read.
    """
    count = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environment or count == "1":
        return
    local = _number(environment, "SLURM_LOCALID")
    tasks = tasks_of_nodes(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID")
    if node < len(tasks):
        environment["LOCAL_WORLD_SIZE"] = str(tasks[node])
    own_gpu = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    if own_gpu and "," not in own_gpu:  # --gpus-per-task: each task sees its own GPU alone, and calls it 0
        local = 0
    environment.update({
        "RANK": str(_number(environment, "SLURM_PROCID")), "WORLD_SIZE": str(_number(environment, _COUNT)),
        "LOCAL_RANK": str(local),
    })  # fmt: skip
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_node(environment.get("SLURM_STEP_NODELIST", ""))
    environment.setdefault("MASTER_PORT", str(_port(environment)))


_COUNT = "SLURM_STEP_NUM_TASKS"


def without_srun(environment: MutableMapping[str, str]) -> str:
    """What to say of a job script that has several tasks and started one process without srun; else nothing."""
    count = environment.get("SLURM_NTASKS", "1")
    if count == "1" or _COUNT in environment or "WORLD_SIZE" in environment or "SLURM_PROCID" not in environment:
        return ""
    return (
        f"SLURM gave this job {count} tasks, but only this one process was started. Put srun before the command, as in "
        f"srun velatura run RECIPE"
    )


def first_node(nodes: str) -> str:
    """The first machine of a list as SLURM writes it.

    >>> first_node("gpu[003-005,9],login1")
    'gpu003'

    Raises:
        VelaturaError: it is empty or no such list.
    """
    first = re.sub(r"\[([^]\[,-]+)[^]\[]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0])
    if not re.fullmatch(r"[\w.:-]+", first):
        raise VelaturaError(
            f"SLURM started several tasks, but SLURM_STEP_NODELIST is {nodes!r}, which names no machine where they "
            f"could meet. Set MASTER_ADDR to the name of the machine of task 0."
        )
    return first


def tasks_of_nodes(counts: str) -> list[int]:
    """How many tasks each machine has; empty where the text cannot be read.

    >>> tasks_of_nodes("8(x2),3")
    [8, 8, 3]
    """
    found: list[int] = []
    for part in counts.split(",") if counts else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return []
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _number(environment: MutableMapping[str, str], name: str) -> int:
    given = environment.get(name)
    if given is None or not given.isdecimal():
        raise VelaturaError(
            f"SLURM started {environment.get(_COUNT)} tasks, but {name} is {given!r} and not a number. Start Velatura "
            f"with srun, or with torchrun."
        )
    return int(given)


def _port(environment: MutableMapping[str, str]) -> int:
    """Another one for each step of each job, and the same for all tasks of a step."""
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    number = int(job) + 101 * int(step) if job.isdecimal() and step.isdecimal() else 0
    return PORTS[number % len(PORTS)]
