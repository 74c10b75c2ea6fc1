"""Writing an exported model so that its folder is never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from velatura.api import VelaturaError

MARK = "velatura.json"
"""The file by which an exported folder is recognised."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A path beside `folder`, hidden, which takes its place when everything has been written there.

    Raises:
        VelaturaError: `folder` holds something else than an exported model.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise VelaturaError(f"{folder} exists and is no exported model (it has no {MARK}): name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield draft
        _swap(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, folder: Path) -> None:
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    if folder.exists():
        folder.rename(former)
    draft.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
