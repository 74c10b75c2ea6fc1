"""A shell in which `velatura` and `python FILE.py` start in a tenth of a second, for the commands of the documentation.

In its path are two commands that ask this process, over a socket, for a fork of one that has everything imported
(fork_server.py); the fork writes to the files that the shell gave the command, so pipes and redirections work.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

POLL = 0.05
"""Seconds between two looks at whether a command has ended."""
ASK = """\
#!{python} -IS
import json, os, signal, socket, sys
name, given = os.path.basename(sys.argv[0]), sys.argv[1:]
if name.startswith("python") and not (given and given[0].endswith(".py")):
    os.execv({python!r}, [{python!r}, *given])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
files = [f"/proc/{{os.getpid()}}/fd/{{number}}" for number in (1, 2)]
argv = given if name == "velatura" else ["script", *given]
order = {{"argv": argv, "cwd": os.getcwd(), "files": files, "environment": dict(os.environ)}}
answers = server.makefile("rw")
answers.write(json.dumps(order) + "\\n")
answers.flush()
pid = json.loads(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = json.loads(answers.readline())
sys.exit(status if status >= 0 else 128 - status)
"""
SERVED = """\
served() {  # a command that goes on until it is stopped: wait until it says that it serves
    "$@" > served.log 2>&1 &
    until grep -q "^serving at http" served.log; do
        kill -0 $! || { cat served.log; return 1; }
        sleep 0.1
    done
    cat served.log
    kill $!
    wait $! || true
}
"""


class Starts(Protocol):
    """What a fork server's client does; see conftest.py."""

    def start(self, *argv: object, cwd: Path, says: Path, errors: Path, environment: Mapping[str, str]) -> int: ...

    def wait(self, *pids: int, seconds: float) -> list[int | None]: ...


class PageShell:
    """Runs scripts with those commands in their path."""

    def __init__(self, forks: Starts) -> None:
        self._forks, self._turn = forks, threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="page-"))  # short: the address of a socket has 107 characters
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self._folder / "asked"))
        self._socket.listen()
        for name in ("velatura", "python", "python3"):
            path = self._folder / name
            path.write_text(ASK.format(python=sys.executable, address=str(self._folder / "asked")))
            path.chmod(0o755)

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        shutil.rmtree(self._folder)

    def run(self, script: str, cwd: Path, variables: Mapping[str, str], seconds: float) -> str:
        """What the script says; it fails as soon as one of its commands does."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        environment["PATH"] = f"{self._folder}:{environment['PATH']}"
        done = subprocess.run(
            ["bash", "-eu", "-c", f"{SERVED}set -x\n{script}"], cwd=cwd, env=environment, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}"
        return done.stdout

    def _listen(self) -> None:
        while True:
            try:
                asked, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(asked,), daemon=True).start()

    def _serve(self, asked: socket.socket) -> None:
        with asked, asked.makefile("rw") as line:
            order: dict[str, Any] = json.loads(line.readline())
            argv: Sequence[str] = order["argv"]
            says, errors = map(Path, order["files"])
            with self._turn:
                pid = self._forks.start(
                    *argv, cwd=Path(order["cwd"]), says=says, errors=errors, environment=order["environment"]
                )
            print(pid, file=line, flush=True)
            status = None
            while status is None:
                threading.Event().wait(POLL)
                with self._turn:
                    (status,) = self._forks.wait(pid, seconds=POLL / 5)
            print(int(status), file=line, flush=True)
