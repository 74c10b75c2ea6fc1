from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from velatura.api import Context, VelaturaError
from velatura.plugins.tasks.prompt_file import PromptFile, PromptFileOptions

Write = Callable[..., str]
LIKE = '{"prompt": "a red fox"}'
MORE = "What rewards need goes into 'metadata'."


def task(**options: Any) -> PromptFile:
    """The task as a recipe in the current folder sets it up."""
    component = PromptFile(PromptFileOptions(**options))
    component.setup(Context(device=torch.device("cpu"), cache=Path(), seed=0, base=Path.cwd()))
    return component


def message(**options: Any) -> str:
    """What a user reads, with the current folder left out."""
    with pytest.raises(VelaturaError) as caught:
        task(**options).prompts("train")
    return str(caught.value).replace(f"{Path.cwd()}/", "")


def test_prompts_are_read_line_by_line(write: Write) -> None:
    name = write(
        '{"prompt": "a fox", "category": "animals"}\n\n{"prompt": "a tree", "id": "t", "metadata": {"n": 1}}\n'
    )
    fox, tree = task(file=name).prompts("train")
    assert (fox.text, fox.task, fox.category, fox.sources) == ("a fox", "t2i", "animals", ())
    assert (tree.id, tree.text, tree.category, tree.metadata) == ("t", "a tree", "general", {"n": 1})


def test_ids_do_not_depend_on_other_lines(write: Write) -> None:
    [one] = task(file=write('{"prompt": "a fox"}\n', "one.jsonl")).prompts("train")
    both = task(file=write('{"prompt": "an owl"}\n{"prompt": "a fox"}\n', "both.jsonl")).prompts("train")
    assert both[1].id == one.id
    assert both[0].id != one.id


def test_images_are_read_when_looked_at(write: Write) -> None:
    name = write('{"prompt": "make it blue", "sources": ["red.png"], "target": "red.png"}\n', "data/edits.jsonl")
    Image.new("RGBA", (4, 2), (255, 0, 51, 9)).save("data/red.png")
    prompts = task(file=name, task="edit").prompts("train")
    [prompt] = prompts
    assert prompt.task == "edit"
    [source] = prompt.sources
    assert source.shape == (3, 2, 4)
    assert source.dtype == torch.float32
    assert source[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert prompt.target is not None
    Path("data/red.png").write_bytes(b"no image")
    with pytest.raises(VelaturaError, match=r"data/red.png is not an image that Pillow can read"):
        prompts[0]


def test_a_picture_that_ends_early(write: Write) -> None:
    name = write('{"prompt": "make it blue", "sources": ["red.png"]}\n')
    Image.effect_noise((32, 32), 60).save("red.png")
    Path("red.png").write_bytes(Path("red.png").read_bytes()[:300])
    prompts = task(file=name, task="edit").prompts("train")
    with pytest.raises(VelaturaError, match=r"red\.png cannot be read: .*truncated.*Put a whole file in its place"):
        prompts[0]


def test_a_part_of_the_prompts_stays_lazy(write: Write) -> None:
    lines = "".join(f'{{"prompt": "{n} foxes"}}\n' for n in range(5))
    prompts = task(file=write(lines)).prompts("train")
    assert len(prompts) == 5
    assert [prompt.text for prompt in prompts[1:3]] == ["1 foxes", "2 foxes"]
    with pytest.raises(IndexError):
        prompts[5]


def test_held_out_prompts_have_a_file_of_their_own(write: Write) -> None:
    train, held_out = write('{"prompt": "a"}\n', "a.jsonl"), write('{"prompt": "b"}\n', "b.jsonl")
    assert [p.text for p in task(file=train, eval_file=held_out).prompts("eval")] == ["b"]
    with pytest.raises(VelaturaError) as caught:
        task(file=train).prompts("eval")
    assert str(caught.value) == (
        "task 'prompts' with file 'a.jsonl' has no prompts to evaluate on: "
        "set its option 'eval_file' to a file of prompts that are not trained on"
    )


def test_a_file_that_is_not_there(write: Write) -> None:
    write("", "prompts.jsonl")
    assert message(file="prompt.jsonl") == "there is no prompt file 'prompt.jsonl'. Did you mean 'prompts.jsonl'?"
    assert message(file="no/where.jsonl") == (
        "there is no prompt file 'no/where.jsonl'. Paths start at the folder of the recipe."
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a fox"', f"this is not JSON: Expecting ',' delimiter (column 19). Write a line like {LIKE}"),
        ('"a fox"', f"this is a text, not an object. Write a line like {LIKE}"),
        (
            '{"text": "a fox"}',
            f"text: no such key. Did you mean 'target'? {MORE}\n"
            "prompts.jsonl:2: prompt: this key is missing: The prompt, or the edit instruction.",
        ),
        (
            '{"prompt": "a", "catgory": "b"}',
            f"catgory: no such key. Did you mean 'category'? {MORE}",
        ),
        ('{"prompt": 3}', 'prompt: give text in double quotes, like "so" (got 3)'),
        ('{"prompt": ""}', "prompt: give text with a length of at least 1 (got '')"),
        ('{"prompt": "an owl"}', "the same prompt as on line 1; remove one of them, or give it an 'id'"),
        ('{"prompt": "a", "id": "first"}', None),
        ('{"prompt": "a", "sources": ["gone.png"]}', "there is no image 'gone.png' in "),
    ],
)
def test_what_is_wrong_is_said_with_the_line(write: Write, line: str, complaint: str | None) -> None:
    name = write(f'{{"prompt": "an owl"}}\n{line}\n', "prompts.jsonl")
    if complaint is None:
        assert len(task(file=name).prompts("train")) == 2
    else:
        assert message(file=name).replace(str(Path.cwd()), "") == f"prompts.jsonl:2: {complaint}"


def test_two_lines_with_one_id(write: Write) -> None:
    name = write('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n')
    assert message(file=name) == "recipe.yaml:2: the same prompt as on line 1; give it another 'id'"


def test_an_edit_needs_a_source(write: Write) -> None:
    assert message(file=write('{"prompt": "make it blue"}\n'), task="edit") == (
        'recipe.yaml:1: an edit needs the image to edit; add "sources": ["picture.png"]'
    )


def test_an_empty_file(write: Write) -> None:
    assert message(file=write("\n\n")) == (
        'recipe.yaml: there are no prompts in it; write lines like {"prompt": "a red fox"}'
    )
