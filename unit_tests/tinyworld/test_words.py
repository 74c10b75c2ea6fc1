import pytest
import torch

from velatura.api import VelaturaError
from velatura.plugins.tinyworld import words
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions


def test_the_null_prompt_is_one_visible_zero_token():
    embeddings, mask = words.encode([""])
    assert embeddings.shape == (1, words.LENGTH, words.WIDTH)
    assert not embeddings.any()
    assert mask.tolist() == [[True] + [False] * 11]


def test_padding_is_zero_and_masked():
    embeddings, mask = words.encode(["a red circle on white"])
    assert mask.sum() == 5
    assert not embeddings[~mask].any()
    assert embeddings[mask].any(1).all()


def test_a_token_carries_the_words_before_it():
    table, width = words.table(), words.WORD_WIDTH
    embeddings, _ = words.encode(["a red circle and a blue square on white"])
    row = {word: table[place] for place, word in enumerate(words.VOCABULARY, start=1)}
    square = embeddings[0, 6].view(words.CONTEXT, width)
    assert torch.equal(square, torch.stack([row[word] for word in ("square", "blue", "a", "and", "circle", "red")]))
    first = embeddings[0, 0]
    assert torch.equal(first[:width], row["a"])
    assert not first[width:].any()


def test_the_table_never_changes():
    table = words.table()
    assert table.shape == (len(words.VOCABULARY) + 1, 64)
    # The first draw of the seed; a checkpoint's meaning hangs on it.
    assert table[1, :3].tolist() == pytest.approx([0.269516, -0.145268, 0.067998], abs=1e-6)
    assert float(table[1:].std()) == pytest.approx(1, abs=0.05)


def test_every_text_of_the_world_fits():
    for task in ("t2i", "edit"):
        prompts = TinyWorld(TinyWorldOptions(task=task, count=1500)).prompts("train")
        _, mask = words.encode([prompt.text for prompt in prompts])
        assert mask.sum(1).max() <= words.LENGTH


def test_an_unknown_word_is_named():
    with pytest.raises(VelaturaError, match="'mauve'"):
        words.encode(["a mauve circle on white"])


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(VelaturaError, match="at most 12 words"):
        words.encode(["red " * 13])
