from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIMIT = 0.5  # seconds of CPU, with the start of Python

PROBE = """
import sys, time, json
from velatura.core.cli import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "numpy", "diffusers", "deepspeed"} & set(sys.modules))
print(json.dumps({"status": status, "heavy": heavy, "cpu": time.process_time()}), file=sys.stderr)
"""


def probe(*arguments: str) -> dict[str, object]:
    """Run a command in a process of its own: exit status, heavy libraries that were imported, CPU seconds."""
    command = [sys.executable, "-c", PROBE, *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    answer: dict[str, object] = json.loads(result.stderr.splitlines()[-1])
    return answer


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["rewards", "bench", "--help"], 0),
        (["serve-reward", "--help"], 0),
        (["plugins", "list"], 0),
        (["schema", "--without-options"], 0),
        (["completion", "bash"], 0),
        (["check", "recipe.yaml", "sead=1"], 2),
        (["run", "recipe.yaml", "stages.teacher.steps=-1"], 2),
        (["check", "gone.yaml"], 2),
    ],
    ids=str,
)
def test_quick_commands_import_no_torch_and_take_less_than_half_a_second(
    pipeline: str, arguments: list[str], status: int
) -> None:
    answers = []
    for _ in range(3):  # the best of three: other processes disturb caches
        answers.append(probe(*arguments))
        if answers[-1]["cpu"] < LIMIT:  # type: ignore[operator]
            break
    assert answers[-1]["status"] == status
    assert answers[-1]["heavy"] == []
    assert min(answer["cpu"] for answer in answers) < LIMIT  # type: ignore[type-var]


LIGHT = ["recipe", "registry", "build", "errors", "components", "hookspecs", "explain", "source", "describe"]


@pytest.mark.parametrize("module", ["velatura.api", *(f"velatura.core.{module}" for module in LIGHT)])
def test_modules_on_the_way_from_yaml_to_names_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_hook_modules_import_no_torch() -> None:
    code = "import sys, velatura.plugins, velatura.rewards, velatura.schedulers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
