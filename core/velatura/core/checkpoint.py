"""Checkpoints that are either complete or not there: safetensors for tensors, JSON for the rest, never pickle.

A checkpoint is a folder `step-000040` with one `<section>.safetensors` per section and `state.json`, which names the
size and the SHA-256 of every other file. It is written under another name and renamed when it is complete on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from velatura.core.errors import CheckpointError

FORMAT = 1
"""Raised when an older Velatura could no longer read what this one writes."""
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_SECTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TEMPORARY = ".writing-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files were all found as they were written."""

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Section -> name -> tensor, on the CPU."""
    state: Mapping[str, Any]
    """What went in as JSON."""


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep` up to it. Call on rank 0 only.

    Whatever goes wrong, the earlier checkpoints stay as they are.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if odd := [section for section in tensors if not _SECTION.fullmatch(section)]:
        raise ValueError(f"a section becomes a file name, which {odd[0]!r} cannot be")
    target = folder / f"step-{step:06d}"
    needed = sum(t.nbytes for section in tensors.values() for t in section.values())
    temporary = folder / f"{_TEMPORARY}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(folder)
        _write(temporary, step, tensors, state)
        _rename(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(target, error, needed) from error
    _prune(folder, step, keep)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after comparing every file with the size and hash it was written with."""
    content = _read_state(path)
    tensors = {}
    for name, facts in content["files"].items():
        _verify(path, name, facts)
        tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    return Checkpoint(path=path, step=content["step"], tensors=tensors, state=content["state"])


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, None where there is none; warns of each that cannot."""
    broken: CheckpointError | None = None
    for path in reversed(_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("{}", error)
            broken = broken or error
    if broken is not None:
        raise CheckpointError(f"no checkpoint in {folder} can be read. The newest: {broken}") from broken
    return None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, unread; None where there is none."""
    paths = _checkpoints(folder)
    return paths[-1] if paths else None


def match_tensors(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], *, what: str) -> None:
    """Raise unless `got` has the names and shapes of `expected`; `what` is the checkpoint, for the message."""
    for name in [*expected, *(n for n in got if n not in expected)]:
        ours = list(expected[name].shape) if name in expected else "nothing"
        theirs = list(got[name].shape) if name in got else "nothing"
        if ours != theirs:
            raise CheckpointError(
                f"{what} is of another model: first difference {name!r}, where the model has {ours} and the checkpoint "
                f"{theirs}. Use the recipe that made it, or another output folder."
            )


def write_json_atomic(path: Path, data: Any) -> None:
    """Write indented JSON; a reader sees the old file or the new one. NaN and infinity are refused: say null."""
    write_text_atomic(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write text so that a reader, or a machine that lost power, sees the old file or the new one."""
    content = text.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error, len(content)) from error


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """All files of a checkpoint, on disk and not merely in the page cache."""
    folder.mkdir()
    files = {}
    for section, content in tensors.items():
        path = folder / f"{section}.safetensors"
        save_file(_separate(content), path)
        _sync(path)
        files[path.name] = _facts(path)
    content_of_state = {"step": step, "files": files, "state": state}
    digest = hashlib.sha256(_canonical(content_of_state)).hexdigest()
    path = folder / _STATE
    path.write_text(json.dumps({"format": FORMAT, "sha256": digest, "content": content_of_state}, indent=1))
    _sync(path)
    _sync(folder)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory: safetensors refuses tied weights."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _rename(temporary: Path, target: Path) -> None:
    """Put a complete folder where it belongs, in place of an older one of the same step."""
    if target.exists():
        replaced = target.with_name(f"{_TEMPORARY}replaced-{target.name}")
        target.rename(replaced)
        temporary.rename(target)
        shutil.rmtree(replaced)
    else:
        temporary.rename(target)
    _sync(target.parent)


def _read_state(path: Path) -> dict[str, Any]:
    """The content of `state.json`, verified."""
    try:
        document = json.loads((path / _STATE).read_bytes())
        found = document["format"]
    except FileNotFoundError as error:
        raise _broken(path, _STATE, "it is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(path, _STATE, "it is not the JSON that was written; it may be truncated") from error
    if found != FORMAT:
        raise _broken(path, _STATE, f"it has format {found}, this Velatura reads format {FORMAT}")
    content: dict[str, Any] = document.get("content", {})
    if hashlib.sha256(_canonical(content)).hexdigest() != document.get("sha256"):
        raise _broken(path, _STATE, "its content is not what was written: the SHA-256 differs")
    return content


def _verify(path: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Raise unless the file is there, as long as it was, and the same."""
    file = path / name
    if not file.is_file():
        raise _broken(path, name, f"it is missing; {facts['bytes']} bytes were written")
    size = file.stat().st_size
    if size != facts["bytes"]:
        raise _broken(path, name, f"it has {size} bytes, {facts['bytes']} were written")
    if _facts(file) != facts:
        raise _broken(path, name, "its content is not what was written: the SHA-256 differs")


def _broken(path: Path, name: str, reason: str) -> CheckpointError:
    """What is wrong with one file, and what to do."""
    earlier = [p.name for p in _checkpoints(path.parent) if p.name < path.name]
    then = f"the run goes on from {earlier[-1]}" if earlier else "the stage starts from its beginning"
    return CheckpointError(f"{path / name} cannot be used: {reason}. Delete {path} and {then}.")


def _unwritable(path: Path, error: Exception, needed: int) -> CheckpointError:
    """Why `path` could not be written; free space is the usual reason."""
    free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
    return CheckpointError(
        f"cannot write {path}: {error}. It needs {needed} bytes and the file system has {free} free. "
        "What was saved before is intact; make room and run the same command again."
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted((p for p in found if _NAME.fullmatch(p.name) and p.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _prune(folder: Path, step: int, keep: int) -> None:
    """Later ones stay: they are of a run that was cut off or found broken, and this one will write them anew."""
    for path in [p for p in _checkpoints(folder) if _step(p) <= step][:-keep]:
        shutil.rmtree(path)


def _remove_temporaries(folder: Path) -> None:
    """What a process that was killed while writing left behind."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
