"""A policy trained on a reward in its process, and on the same reward behind `velatura serve-reward`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

COMMAND = Path(sys.executable).with_name("velatura")
TINY = Path(__file__).with_name("recipes") / "tiny.yaml"
TOKEN = "8f3a1c"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
FUNCTION = """
def redness(image, prompt):
    # Rounded as a PNG file rounds, so that the reward is the same on both sides.
    pixels = (image.clamp(0, 1) * 255).round() / 255
    return None if prompt.category == "portrait" else pixels[0].mean() - pixels[1].mean()
"""
PLAIN = {"use": "function", "name": "redness", "with": {"file": "./redness.py", "call": "redness"}}


@pytest.fixture
def said(velatura: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Does the command; what it prints as an error."""

    def run(*arguments: object, token: str = TOKEN, **options: Any) -> str:
        done = velatura(*arguments, cwd=tmp_path, environment={"REWARD_TOKEN": token}, **options)
        return " ".join(done.stderr.split())

    return run


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`velatura serve-reward`, the installed command; its address."""
    with ExitStack() as stack:

        def start(*arguments: object) -> str:
            command = [str(COMMAND), "serve-reward", *map(str, arguments), "--port", "0", "--token-env", "REWARD_TOKEN"]
            environment = ENVIRONMENT | {"REWARD_TOKEN": TOKEN}
            said = stack.enter_context((tmp_path / "server.log").open("w"))
            server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=subprocess.STDOUT)
            stack.callback(server.wait)
            stack.callback(server.terminate)
            return _address(server, tmp_path / "server.log")

        yield start


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """What the server says when it listens."""
    end = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < end:
        if found := re.search(r"^serving at (\S+) ", log.read_text(), flags=re.MULTILINE):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def recipe(folder: Path, name: str, reward: dict[str, Any]) -> Path:
    """Two steps of reinforcement learning on one reward, from random weights."""
    tiny = yaml.safe_load(TINY.read_text())
    stage = {
        "stage": "rl", "rewards": [reward], "steps": 2, "prompts_per_step": 3, "group_size": 4, "micro_batch": 16,
        "task": {"use": "tinyworld", "with": {"task": "t2i", "count": 8, "categories": ["portrait", "single"]}},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tiny | {"stages": {"teacher": stage}, "observers": []}))
    return path


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """What the run measured, without times."""
    lines = (folder / "runs" / name / "teacher" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def behind(address: str, **options: Any) -> dict[str, Any]:
    given = {"server": address, "reward": "redness", "token_env": "REWARD_TOKEN", "batch_size": 5, "backoff": 0.01}
    return {"use": "http", "name": "redness", "with": given | options}


def test_a_served_reward_teaches_what_it_teaches_in_process(
    tmp_path: Path, serve: Callable[..., str], said: Callable[..., str]
) -> None:
    (tmp_path / "redness.py").write_text(FUNCTION)
    said("run", recipe(tmp_path, "inside", PLAIN))
    inside = metrics(tmp_path, "inside")
    assert len(inside) == 2
    assert all(row["updated"] == 1 and row["grad_norm"] > 0 for row in inside)

    address = serve(tmp_path / "inside.yaml")
    said("run", recipe(tmp_path, "outside", behind(address)))
    assert metrics(tmp_path, "outside") == inside


def test_what_does_not_fit_the_server_ends_the_run_with_one_message(
    tmp_path: Path, serve: Callable[..., str], said: Callable[..., str]
) -> None:
    (tmp_path / "redness.py").write_text(FUNCTION)
    address = serve("function", "file=./redness.py", "call=redness", "--label", "redness", "--max-pictures", 8)
    done = said("run", recipe(tmp_path, "token", behind(address)), status=2, token="wrong")
    assert "status 401: this token is not the server's" in done
    done = said("run", recipe(tmp_path, "name", behind(address, reward="rednes")), status=2)
    assert "serves no reward 'rednes'. Did you mean 'redness'?" in done
    done = said("run", recipe(tmp_path, "batch", behind(address, batch_size=16)), status=2)
    assert "takes 8 pictures a request, and `batch_size` is 16" in done


def test_the_command_says_what_it_cannot_serve(said: Callable[..., str]) -> None:
    for arguments, expected in [
        (["tinyworld-sharpnes"], "neither a recipe file nor a reward. Did you mean 'tinyworld-sharpness'?"),
        (["tinyworld-sharpness", "gian=2"], "gian: no such option. Did you mean 'gain'?"),
        (["function", "file=./gone.py", "call=f"], "there is no file"),
        (["vlm-pairs", "rubric=aesthetics", "model=x"], "cannot be served"),
        (["tinyworld-sharpness", "--token-env", "REWARD_TOKEN"], "the environment has no REWARD_TOKEN"),
    ]:
        done = said("serve-reward", *arguments, status=2, token="")
        assert expected in done
