"""Prompts from a JSONL file: one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, overload

from pydantic import BaseModel, ConfigDict, Field

from velatura.api import Context, Options, Prompt, Task, VelaturaError
from velatura.core.errors import suggest
from velatura.core.jsonl import parse_line
from velatura.core.ratings import read_image

LIKE = '{"prompt": "a red fox"}'
"""The shortest line that would do."""


class PromptFileOptions(Options):
    """Which files."""

    file: str = Field(description="Prompts to train on: JSONL, seen from the recipe.")
    eval_file: str | None = Field(None, description="Held-out prompts for evaluation, in the same form.")
    task: Literal["t2i", "edit"] = Field("t2i", description="The route of all prompts; edits need `sources`.")


class PromptLine(BaseModel):
    """One line of a prompt file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1, description="The prompt, or the edit instruction.")
    id: str | None = Field(None, description="Unique in the file; made from the content when left out.")
    category: str = Field("general", description="Chooses reward weights and groups the evaluation.")
    sources: tuple[str, ...] = Field((), description="Source images of an edit; paths seen from the file.")
    target: str | None = Field(None, description="The picture to learn from, for supervised stages.")
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="Height and width of the picture in pixels."
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description="Whatever the rewards need.")

    @property
    def key(self) -> str:
        """The id, or one that stays the same when other lines come and go."""
        text = json.dumps([self.prompt, self.sources, self.target], ensure_ascii=True)
        return self.id or hashlib.sha256(text.encode()).hexdigest()[:12]


class PromptFile(Task[PromptFileOptions]):
    """Prompts from a JSONL file.

    Each line is an object like {"prompt": "a red fox", "category": "animals"}; `id`, `category`, `sources` (paths of
    the images to edit, seen from the file), `target` (the picture to learn from), `size` ([height, width]) and
    `metadata` may be left out.
    """

    name = "prompts"

    _context: Context | None = None

    def setup(self, context: Context) -> None:
        """Remember where the recipe is."""
        self._context = context

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """All prompts of a file; images are read when a prompt is looked at."""
        chosen = self.options.file if split == "train" else self.options.eval_file
        if chosen is None:
            raise VelaturaError(
                f"task 'prompts' with file {self.options.file!r} has no prompts to evaluate on: "
                "set its option 'eval_file' to a file of prompts that are not trained on"
            )
        path = self._context.resolve(chosen) if self._context is not None else Path(chosen)
        return FilePrompts(read_prompts(path, self.options.task), path.parent, self.options.task)


class FilePrompts(Sequence[Prompt]):
    """Prompts whose images are read on access."""

    def __init__(self, lines: Sequence[tuple[str, PromptLine]], folder: Path, task: str) -> None:
        """Lines with their ids, and where their paths start."""
        self._lines, self._folder, self._task = lines, folder, task

    def __len__(self) -> int:
        """How many prompts."""
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        """One prompt with its images, or some of them still lazy."""
        if isinstance(index, slice):
            return FilePrompts(self._lines[index], self._folder, self._task)
        key, line = self._lines[index]
        return Prompt(
            id=key,
            text=line.prompt,
            task=self._task,
            category=line.category,
            sources=tuple(read_image(self._folder / source) for source in line.sources),
            target=read_image(self._folder / line.target) if line.target is not None else None,
            size=line.size,
            metadata=line.metadata,
        )


def read_prompts(path: Path, task: str) -> list[tuple[str, PromptLine]]:
    """The lines of a prompt file with their ids; the first thing wrong is an error with its line number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        names = [found.name for found in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        hint = suggest(path.name, names) if names else " Paths start at the folder of the recipe."
        raise VelaturaError(f"there is no prompt file {str(path)!r}.{hint}") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise VelaturaError(f"{path}: a prompt file is a text file in UTF-8, one JSON object a line") from error
    lines = list(_parsed(path, text, task))
    if not lines:
        raise VelaturaError(f"{path}: there are no prompts in it; write lines like {LIKE}")
    return lines


def _parsed(path: Path, text: str, task: str) -> Iterator[tuple[str, PromptLine]]:
    """Each line that is not blank, with its id."""
    first: dict[str, int] = {}
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        line = parse_line(f"{path}:{number}", raw, PromptLine, LIKE, "What rewards need goes into 'metadata'.")
        if line.key in first:
            remedy = "give it another 'id'" if line.id else "remove one of them, or give it an 'id'"
            raise VelaturaError(f"{path}:{number}: the same prompt as on line {first[line.key]}; {remedy}")
        first[line.key] = number
        if task == "edit" and not line.sources:
            raise VelaturaError(f'{path}:{number}: an edit needs the image to edit; add "sources": ["picture.png"]')
        for image in (*line.sources, *([line.target] if line.target is not None else [])):
            if not (path.parent / image).is_file():
                raise VelaturaError(f"{path}:{number}: there is no image {image!r} in {path.parent}")
        yield line.key, line
