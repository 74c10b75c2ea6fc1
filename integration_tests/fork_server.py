"""Has everything imported and forks a process for each run, so that a test can start, kill and resume dozens of them.

Reads orders from stdin and answers on stdout, a JSON object a line each. A forked process is a real one: it has an id,
a file for what it says, an exit status, and can be given the environment of one rank of several.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOADED = (
    "velatura.core.cli.program", "velatura.core.pipeline", "velatura.core.check", "velatura.core.closing",
    "velatura.core.cards.required", "velatura.core.stages.curate", "velatura.core.stages.rl",
    "velatura.core.stages.distill", "velatura.core.stages.evaluate", "velatura.core.stages.supervised",
    "velatura.core.engine.local", "velatura.core.engine.deepspeed", "velatura.core.allocator", "velatura.core.replay",
    "velatura.rewards", "velatura.schedulers", "velatura.plugins", "velatura.plugins.adapters.tinyworld",
    "velatura.plugins.observers", "torch.distributed.rendezvous", "deepspeed", "pyarrow.compute", "pyarrow.dataset",
    "scipy.optimize", "scipy.stats", "torch.utils.tensorboard",
)  # fmt: skip


def preload() -> None:
    """Import what runs import, without starting a thread that a fork would lose."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import warnings

    warnings.simplefilter("ignore")
    for name in PRELOADED:
        importlib.import_module(name)
    import torch
    from PIL import Image

    from velatura.core.registry import Registry

    Image.init()
    registry = Registry.discover()
    for info in registry.list():
        if info.name.startswith("tinyworld") or info.kind not in ("adapter", "reward", "judge_model"):
            registry.get(info.kind, info.name)
    adapter: Any = registry.get("adapter", "tinyworld")
    small = {"weights": None, "width": 32, "heads": 2, "layers": 1}
    adapter(adapter.options_class.model_validate(small)).load(torch.device("cpu"))
    gc.collect()
    gc.freeze()  # else the first collection of every fork visits, and thereby copies, all that was imported


def fork(
    argv: Sequence[str], cwd: str, says: str, errors: str, environment: Mapping[str, str],
    faults: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Do `velatura ARGV` in a new process, whose stdout goes to the file `says` and whose stderr to `errors`."""
    pid = os.fork()
    if pid:
        return {"pid": pid}
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(cwd)
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, says), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        for fault in faults:
            arm(**fault)
        status = do(argv)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else stop.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def do(argv: Sequence[str]) -> int:
    """The command; `stage RECIPE NAME` does a stage and makes no report, `script FILE ...` runs a file of Python."""
    from velatura.core import watch
    from velatura.core.cli import program
    from velatura.core.stages import showcase

    program.FAREWELL, watch.PERIOD = 1.0, 1.0  # what processes wait for each other on one machine
    showcase.SEEDS = 2
    if argv[0] == "script":
        sys.argv = list(argv[1:])
        sys.path.insert(0, str(Path(argv[1]).parent))
        runpy.run_path(argv[1], run_name="__main__")
        return 0
    if argv[0] != "stage":
        return program.main(list(argv), launched=True)
    from velatura.core.errors import VelaturaError
    from velatura.core.pipeline import run_pipeline

    try:
        run_pipeline(Path(argv[1]), list(argv[3:]), only=argv[2])
    except VelaturaError as error:
        print(f"velatura: {error}", file=sys.stderr)
        return 2
    return 0


def arm(do: str, at: str = "", call: int = 1, seconds: float = 0.0, size: int = 0, report: str = "") -> None:
    """Prepare a fault of this process.

    `do`: `kill` (SIGKILL), `raise` (an error that nobody expects), `sleep` or `nan` (the `value` that it returns is not
    finite), at the `call`-th call of the function `at`, `module:name`; `limit`: no file can grow above `size` bytes;
    `stranger`: be a user who may write nothing; `count`: write how many functions of Velatura were called into
    `report`; `kill-anywhere`: SIGKILL at the `call`-th.
    """
    if do == "stranger":
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    elif do == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    elif do in ("count", "kill-anywhere"):
        watch_calls(call if do == "kill-anywhere" else 0, report)
    else:
        module, _, path = at.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, broken(getattr(owner, name), do, call, seconds))


def broken(function: Callable[..., Any], do: str, call: int, seconds: float) -> Callable[..., Any]:
    """`function`, whose `call`-th call does something else first."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if do == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if do == "raise":
                raise ArithmeticError("something that nobody expected")
            if do == "nan":
                result = function(*arguments, **options)
                return dataclasses.replace(result, value=result.value * float("nan"))
            time.sleep(seconds)
        return function(*arguments, **options)

    return wrapped


def watch_calls(kill_at: int, report: str) -> None:
    """Count calls of Velatura's own functions in the main thread: a measure of progress that no clock disturbs."""
    calls, ours = 0, {}

    def each(frame: Any, event: str, _: object) -> None:
        nonlocal calls
        if event != "call":
            return
        key = id(frame.f_code)
        if key not in ours:
            ours[key] = "/velatura/" in frame.f_code.co_filename
        if ours[key]:
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if report:
        atexit.register(lambda: Path(report).write_text(str(calls)))
    sys.setprofile(each)


def wait(pids: Sequence[int], seconds: float) -> dict[str, Any]:
    """Exit status of each process, negative for a signal; None for those that run after so many seconds."""
    until, found = time.monotonic() + seconds, dict.fromkeys(pids)
    while time.monotonic() < until and None in found.values():
        for pid in [pid for pid, status in found.items() if status is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return {str(pid): status for pid, status in found.items()}


def main() -> None:
    """Serve until stdin ends."""
    preload()
    answers = os.fdopen(os.dup(1), "w")
    os.set_inheritable(answers.fileno(), False)
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        answer = {"fork": fork, "wait": wait}[order.pop("do")](**order)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
