from __future__ import annotations

import random

import pytest
import torch

from velatura.api import Prompt, VelaturaError
from velatura.rewards.ocr import Ocr, OcrOptions
from velatura.rewards.wording import compare, nearest, quoted


def distance(a, b):
    """Levenshtein's, by the plain recursion over prefixes."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        below = [i]
        for j, y in enumerate(b, start=1):
            below.append(min(row[j - 1] + (x != y), below[-1] + 1, row[j] + 1))
        row = below
    return row[-1]


def prompt(wish, sources=(), **metadata):
    return Prompt(id="7", text=wish, task="edit" if sources else "t2i", sources=sources, metadata=metadata)


def asked(given, **options):
    return Ocr(OcrOptions(**options)).asked(given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a sign that says "OPEN" and "24 hours"', ("OPEN", "24 hours")),
        ("ein Schild, „Bäckerei“, und «Café»", ("Bäckerei", "Café")),
        ("a book “Flow” 「こんにちは」『你好』", ("Flow", "こんにちは", "你好")),
        ("the dogs' bowl and rock 'n' roll", ()),
        ('an empty "" and a lone " quote', ()),
    ],
)
def test_words_in_double_quotes_are_asked_for(text, expected):
    assert quoted(text) == expected


def test_metadata_goes_before_quotes_and_edits_are_not_searched_for_quotes():
    source = (torch.zeros(3, 8, 8),)
    assert asked(prompt('a sign "A"')) == ("A",)
    assert asked(prompt('a sign "A"', text="B")) == ("B",)
    assert asked(prompt('a sign "A"', text=["B", "C"])) == ("B", "C")
    assert asked(prompt('a sign "A"', text="B"), text="quotes") == ("A",)
    assert asked(prompt('a sign "A"'), text="metadata") == ()
    assert asked(prompt('a sign "A"', words="D"), field="words") == ("D",)
    assert asked(prompt('replace "A" by "B"', source)) == ()
    assert asked(prompt('replace "A" by "B"', source, text="B")) == ("B",)


def test_prompts_that_ask_for_no_words_are_not_judged():
    for given in (prompt("a red fox"), prompt('a sign "A"', text=[]), prompt('" "'), prompt("a fox", text=" ")):
        assert not Ocr().applies(given)
    assert Ocr().applies(prompt('a sign "A"'))


@pytest.mark.parametrize("value", [3, None, ["A", 4], {"text": "A"}])
def test_metadata_of_another_kind_is_an_error_that_names_the_prompt(value):
    with pytest.raises(VelaturaError, match=r"Prompt '7': its metadata field 'text' holds .* a list of strings"):
        asked(prompt("a sign", text=value))


def test_the_nearest_stretch_is_the_best_of_all():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("abc", k=rng.randint(1, 5)))
        line = "".join(rng.choices("abc", k=rng.randint(0, 8)))
        spans = [(i, j) for i in range(len(line) + 1) for j in range(i, len(line) + 1)]
        least = min(distance(text, line[i:j]) for i, j in spans)
        found, start, stop = nearest(text, line)
        assert found == least == distance(text, line[start:stop])
        assert stop - start == max(j - i for i, j in spans if distance(text, line[i:j]) == least)


@pytest.mark.parametrize(
    ("words", "found", "score"),
    [
        (["OPEN"], ["open"], 1),
        (["OPEN"], [], 0),
        (["OPEN"], ["OPAN"], 3 / 4),
        (["OPEN"], ["OPE"], 3 / 4),
        (["OPEN"], ["OPENS"], 4 / 5),
        (["OPEN"], ["SHUT"], 0),
        (["OPEN"], ["OPEN"] * 4, 4 / 16),
        (["FLOW MATCHING"], ["FLOW", "MATCHING"], 1),
        (["FLOW", "MATCHING"], ["FLOWMATCHING"], 1),
        (["cat", "dog"], ["dog", "cat"], 1),
        (["cat", "cat"], ["cat"], 1 / 2),
        (["ABC"], ["AB", "x", "C"], 3 / 4 - 1 / 12),
        (["ﬁne №2"], ["fine No2"], 1),
    ],
)
def test_scores_are_those_of_the_formula(words, found, score):
    assert compare(words, found).score(1.0) == pytest.approx(score)


def test_one_text_in_full_scores_one_minus_the_edit_distance_over_the_longer_length():
    for found in ("xxFLOWxx", "FLOW", "FLO", "F", "FLAW", "FLOWERS"):
        expected = 1 - distance("FLOW", found) / max(4, len(found))
        assert compare(["FLOW"], [found], match_case=True).score(1.0) == pytest.approx(expected)


def test_options_for_case_and_flooding():
    assert compare(["Open"], ["OPEN"], match_case=True).score(1.0) == pytest.approx(1 / 4)
    flood = compare(["OPEN"], ["OPEN", "lorem ipsum"])
    assert (flood.asked, flood.wrong, flood.extra) == (4, 0, 10)
    assert [flood.score(weight) for weight in (0, 1, 2)] == pytest.approx([1, 4 / 14, 4 / 24])
