"""Checkpoints that are either complete or not there: safetensors for tensors, JSON for the rest, never pickle.

A checkpoint is a folder `step-000040` with `<section>.safetensors` for every section and `state.json`, which names the
size and the SHA-256 of every other file. It is written under another name and renamed when it is complete on disk.
Of several processes each writes the tensors it is given, whole ones, to `<section>.2-of-8.safetensors`, so that any
number of processes, under any engine, reads them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from velatura.core.errors import CheckpointError
from velatura.core.ranks import FailedElsewhere, Ranks

FORMAT = 2
"""Raised when an older Velatura could no longer read what this one writes."""
READ = (1, 2)
"""Formats that this one reads; 1 knew no parts."""
ALONE = Ranks()
R = TypeVar("R")
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_SECTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_TENSORS = re.compile(rf"({_SECTION.pattern})(\.\d+-of-\d+)?\.safetensors")
_TEMPORARY = ".writing-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files were all found as they were written."""

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Section -> name -> tensor, on the CPU, read when it is asked for."""
    state: Mapping[str, Any]
    """What went in as JSON."""

    def file(self, name: str) -> Path | None:
        """A file that went in as it was, if there is one of this name."""
        path = self.path / name
        return path if path.is_file() else None


class Section(Mapping[str, Tensor]):
    """The tensors of a section, from as many files as processes wrote; each is read when it is asked for, so that a
    process that needs its share of a large model never holds all of it."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    @cached_property
    def _where(self) -> dict[str, Any]:
        """Name -> opened file."""
        opened: list[Any] = [safe_open(path, framework="pt") for path in self.files]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (it is no mapping)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._where  # a mapping's own would read the tensor

    def shape(self, name: str) -> list[int]:
        """Of the tensor `name`, from the head of its file; no number is read."""
        shape: list[int] = self._where[name].get_slice(name).get_shape()
        return shape

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def __len__(self) -> int:
        return len(self._where)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int | None = None,
    single: Mapping[str, Mapping[str, Tensor]] | None = None,
    files: Mapping[str, Path] | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the checkpoint of `step`, then remove those before it that need not be kept.

    Kept are the newest `keep` and those whose step is a multiple of `keep_every`. Every rank calls it with the part of
    the tensors that it is to write, and with the `single` sections of which it alone writes all, to a file without a
    number; `state` and `files`, which go in as they are under their names, are the first rank's. Nothing has its name
    before all ranks have written all, and whatever goes wrong on any of them, the earlier checkpoints stay as they are.
    Collective.

    Raises:
        CheckpointError: on the first rank, and on one that could not write; FailedElsewhere on the others.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    part = f".{ranks.rank + 1}-of-{ranks.size}" if ranks.size > 1 else ""
    parts = {f"{name}{part}": own for name, own in tensors.items()} | dict(single or {})
    if odd := [name for name in parts if not _SECTION.fullmatch(name.removesuffix(part))]:
        raise ValueError(f"a section becomes a file name, which {odd[0]!r} cannot be")
    target = folder / f"step-{step:06d}"
    needed = sum(t.nbytes for own in parts.values() for t in own.values())
    temporary = folder / f"{_TEMPORARY}{target.name}"

    def guarded(write: Callable[[], R]) -> R:
        try:
            return write()
        except (OSError, SafetensorError) as error:
            if ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise _unwritable(target, error, needed) from error

    ranks.from_first(lambda: guarded(lambda: _begin(folder, temporary)))
    written = _agreed(ranks, step, temporary, lambda: guarded(lambda: _write(temporary, parts)))
    ranks.from_first(lambda: guarded(lambda: _finish(temporary, target, step, written, state, files or {})))
    ranks.from_first(lambda: guarded(lambda: _prune(folder, step, keep, keep_every)))
    return target


def load_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint after comparing every file with the size and hash it was written with, unless another process
    has just done so (`verify`)."""
    content = _read_state(path)
    sections: dict[str, list[Path]] = {}
    for name, facts in content["files"].items():
        if verify:
            _verify(path, name, facts)
        if found := _TENSORS.fullmatch(name):
            sections.setdefault(found[1], []).append(path / name)
    tensors = {name: Section(own) for name, own in sections.items()}
    return Checkpoint(path=path, step=content["step"], tensors=tensors, state=content["state"])


def load_latest(folder: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The newest checkpoint that can be read, None where there is none; warns of each that cannot. The first rank
    chooses for all. Collective.

    Raises:
        CheckpointError: there are some, and none can be read.
    """
    if ranks.size == 1:
        return _latest(folder)
    chosen = ranks.from_first(lambda: getattr(_latest(folder), "path", None))
    return None if chosen is None else load_checkpoint(chosen, verify=False)


def _latest(folder: Path) -> Checkpoint | None:
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


def match_tensors(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], *, what: str) -> None:
    """Raise unless `got` has the names and shapes of `expected`; `what` is the checkpoint, for the message."""
    for name in [*expected, *(n for n in got if n not in expected)]:
        ours, theirs = (_shape(tensors, name) if name in tensors else "nothing" for tensors in (expected, got))
        if ours != theirs:
            raise CheckpointError(
                f"{what} is of another model: first difference {name!r}, where the model has {ours} and the checkpoint "
                f"{theirs}. Use the recipe that made it, or another output folder."
            )


def _shape(tensors: Mapping[str, Tensor], name: str) -> list[int]:
    return tensors.shape(name) if isinstance(tensors, Section) else list(tensors[name].shape)


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


def _begin(folder: Path, temporary: Path) -> None:
    """An empty folder to write to."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{_TEMPORARY}*"):  # of a process that was killed while it wrote
        shutil.rmtree(path)
    temporary.mkdir()


def _write(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The files of this process, on disk and not merely in the page cache."""
    files = {}
    for name, content in parts.items():
        path = folder / f"{name}.safetensors"
        save_file(_separate(content), path)
        _sync(path)
        files[path.name] = _facts(path)
    return files


def _agreed(ranks: Ranks, step: int, temporary: Path, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What all ranks have written, if every one has, and of this step."""
    mine, failure = {}, None
    try:
        mine = write()
    except CheckpointError as error:
        failure = error
    told = ranks.gather((step, mine, None if failure is None else str(failure)))
    failed = [rank for rank, (_, _, why) in enumerate(told) if why is not None]
    steps = [one for one, _, _ in told]
    if not failed and len(set(steps)) == 1:
        return {name: facts for _, files, _ in told for name, facts in files.items()}
    if ranks.first:
        shutil.rmtree(temporary, ignore_errors=True)
    if failure is not None:
        raise failure
    if not ranks.first:
        raise FailedElsewhere("the first process says why no checkpoint was written")
    if failed:
        raise CheckpointError(f"process {failed[0]}: {told[failed[0]][2]}")
    raise CheckpointError(f"the processes would save different steps, {steps}; no checkpoint was written")


def _finish(
    temporary: Path, target: Path, step: int, written: Mapping[str, Any], state: Mapping[str, Any],
    files: Mapping[str, Path],
) -> None:  # fmt: skip
    """Say what belongs to the checkpoint, and give it its name."""
    listed = dict(written)
    for name, source in files.items():
        path = temporary / name
        shutil.copyfile(source, path)
        _sync(path)
        listed[name] = _facts(path)
    content = {"step": step, "files": listed, "state": state}
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    path = temporary / _STATE
    path.write_text(json.dumps({"format": FORMAT, "sha256": digest, "content": content}, indent=1))
    _sync(path)
    _sync(temporary)
    _rename(temporary, target)


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
    if found not in READ:
        raise _broken(path, _STATE, f"it has format {found}, this Velatura reads formats {READ[0]} to {READ[-1]}")
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


def _prune(folder: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Later ones stay: they are of a run that was cut off or found broken, and this one will write them anew."""
    for path in [p for p in _checkpoints(folder) if _step(p) <= step][:-keep]:
        if keep_every is None or _step(path) % keep_every:
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
