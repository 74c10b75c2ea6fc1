"""The machines of a run: a hostfile as DeepSpeed and MPI have it, and the command that starts processes on them."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from velatura.core.errors import VelaturaError
from velatura.core.slurm import PORTS

REACHED_WITHIN = 20
"""Seconds until a machine that does not answer is given up."""
ELSEWHERE = (
    "Or start the processes without it: torchrun on each machine, or srun under SLURM; docs/scaling.md shows both."
)


def read_hostfile(path: Path) -> dict[str, int]:
    """Machine -> number of its processes, in the order of the file: `NAME slots=N` a line, `#` begins a comment.

    Raises:
        VelaturaError: it is missing, or a line is none of these; the message names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VelaturaError(f"--hostfile {path} cannot be read: {error}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.split("#", maxsplit=1)[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.:-]+)\s+slots=(\d+)", text, flags=re.ASCII)
        if match is None or int(match[2]) < 1:
            raise VelaturaError(
                f"{path}, line {number}: {text!r} is no machine. Write its name and how many processes it gets, "
                f"usually one for each GPU: worker-1 slots=8"
            )
        if match[1] in found:
            raise VelaturaError(
                f"{path}, line {number}: {match[1]!r} is there twice. Give it all its slots in one line."
            )
        found[match[1]] = int(match[2])
    if not found:
        raise VelaturaError(f"{path} names no machine. Write one a line: worker-1 slots=8")
    return found


def is_here(machine: str) -> bool:
    """Whether a name certainly means this machine."""
    own = socket.gethostname()
    return machine in ("localhost", "127.0.0.1", "::1", own, own.split(".", maxsplit=1)[0])


def start_on(machines: Mapping[str, int], hostfile: Path, arguments: Sequence[str]) -> int:
    """Become DeepSpeed's launcher, which runs `velatura ARGUMENTS` on all machines, in this folder.

    Raises:
        VelaturaError: a program is missing, or a machine cannot be reached; nothing was started.
    """
    for program, why in (("pdsh", "starts the processes on several machines"), ("ssh", "reaches them")):
        if shutil.which(program) is None:
            raise VelaturaError(
                f"--hostfile names {len(machines)} machines, and DeepSpeed's launcher needs {program}, which {why} and "
                f"is not installed here. Install it ('apt install {program}'). {ELSEWHERE}"
            )
    here = str(Path.cwd())
    if not re.fullmatch(r"[\w@+=:,./-]+", here, flags=re.ASCII):
        raise VelaturaError(
            f"the folder {here!r} has signs in its name that a remote shell would read. Start elsewhere."
        )
    address = os.environ.get("MASTER_ADDR") or _reach(list(machines))
    sys.stdout.flush()
    command = command_of(hostfile, arguments, address)
    os.execv(command[0], command)


def command_of(hostfile: Path, arguments: Sequence[str], address: str) -> list[str]:
    """DeepSpeed's launcher with everything behind it. It hands arguments to a remote shell as they are, so they go as
    one word that no shell reads: JSON in base64."""
    word = base64.urlsafe_b64encode(json.dumps(list(arguments)).encode()).decode()
    port = os.environ.get("MASTER_PORT") or str(PORTS[os.getpid() % len(PORTS)])
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--master_addr", address,
        "--master_port", port, "--force_multi", "--no_ssh_check", "--launcher_args=-N", "--no_local_rank", "--quiet",
        "--module", "velatura.core.cli.started", word,
    ]  # fmt: skip


def _reach(machines: Sequence[str]) -> str:
    """Log in to every machine, and return the address at which the others find the first."""
    asked = {
        machine: subprocess.Popen(
            ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", machine, "hostname", "-I"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for machine in machines
    }  # fmt: skip
    answers, failed = {}, []
    for machine, process in asked.items():
        try:
            answers[machine], said = process.communicate(timeout=REACHED_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            said = f"no answer in {REACHED_WITHIN} s"
        if process.returncode != 0:
            failed.append(f"{machine} ({(said.strip().splitlines() or ['no reason given'])[-1]})")
    if failed:
        raise VelaturaError(
            f"ssh does not reach {', '.join(failed)}. Every machine of the hostfile has to be reached without a "
            f"password: try 'ssh {failed[0].split(' ')[0]} hostname'. {ELSEWHERE}"
        )
    first = machines[0]
    addresses = answers[first].split()
    if not addresses:
        raise VelaturaError(f"{first} does not tell its address ('hostname -I' is empty). Set MASTER_ADDR to it.")
    return addresses[0]
