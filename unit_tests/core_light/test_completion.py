"""The scripts of `velatura completion`, asked by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from velatura.core.cli import main

BASH = """source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_velatura; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """autoload -U compinit; compinit -u -d {folder}/dump; source {script}
compadd() {{ print -l -- $found }}; _files() {{ }}
words=({words}); CURRENT=$#words; _velatura
"""
FISH = "source {script}; complete -C '{line}'"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one script for each shell."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(said.getvalue())
    return folder


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("velatura pl", {"plugins"}, {"run"}),
        ("velatura plugins ", {"list", "show", "check"}, {"run"}),
        ("velatura plugins show high", {"high-noise"}, {"uniform"}),
        ("velatura plugins list --kind re", {"reward"}, {"adapter"}),
        ("velatura run --fr", {"--fresh"}, {"--kind"}),
        ("velatura run tinyw", {"tinyworld"}, {"sd35-medium"}),
        ("velatura rewards bench --ca", {"--calls"}, {"--kind"}),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes(
    shell: str, line: str, some: set[str], none: set[str], scripts: Path, tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    words = " ".join(f"'{word}'" for word in line.split(" "))
    code = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell].format(
        script=scripts / shell, words=words, line=line, folder=tmp_path
    )
    done = subprocess.run(
        [shell, "-c", code], check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TERM": "dumb"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {word.split("\t")[0] for word in done.stdout.split("\n")}
    assert some <= found
    if shell != "zsh":  # there the shell itself leaves out what does not begin like the word
        assert not none & found


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fihs"]) == 2
    assert capsys.readouterr().err == "velatura: there is no completion for 'fihs'. Did you mean 'fish'?\n"
